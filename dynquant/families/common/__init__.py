"""Code that the model families share: configuration, conversions, metadata keys, rope scaling."""
