"""Architectures without a family here, by llama.cpp's own converter, which a tree of its sources holds."""
