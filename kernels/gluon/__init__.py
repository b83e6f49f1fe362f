"""Kernels in Gluon, Triton's lower level that names layouts and barriers: for the GPUs and version it was tested on."""
