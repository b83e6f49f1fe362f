"""The training of the closing pass."""
