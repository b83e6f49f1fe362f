"""Files that hold a model, read lazily: safetensors directories and GGUF files."""
