"""Encoding and decoding of packed blocks. `decode` is all a reader of weights needs."""

from dynquant.formats.decode import decode

__all__ = ["decode"]
