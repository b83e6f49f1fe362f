"""The Triton kernels; imported only where a GPU or the interpreter runs them."""
