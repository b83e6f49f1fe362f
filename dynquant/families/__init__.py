"""From a Hugging Face checkpoint to GGUF names and metadata, and back."""
