"""A quantized model running in PyTorch, its weights still packed."""
