"""Step 5, eval: how far a quantized model is from its original."""
