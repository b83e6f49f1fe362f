"""Plain-PyTorch and Triton kernels; importing this package touches no device."""
