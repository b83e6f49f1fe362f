"""Tokenizers in GGUF terms."""
