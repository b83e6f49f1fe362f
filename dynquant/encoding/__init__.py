"""Step 4, export: weights to bytes, by our encoder or by ggml."""
