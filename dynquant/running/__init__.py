"""A Hugging Face model executed, whole or layer by layer from disk."""
