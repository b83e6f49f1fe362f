"""dynquant: measured dynamic low-bit quantization of language models."""

__version__ = "0.1.0"
