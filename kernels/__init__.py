"""Plain-PyTorch, Triton and Gluon kernels; importing this package touches no device."""
