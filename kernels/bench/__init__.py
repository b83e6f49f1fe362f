"""Measurements of the kernels that are run by hand."""
