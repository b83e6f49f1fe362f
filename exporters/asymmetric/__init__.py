"""Encoding under the inputs that the quantized model itself has."""
