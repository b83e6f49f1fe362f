"""Quantized weights as they are published beside floats: layouts, and the values that they stand for."""
