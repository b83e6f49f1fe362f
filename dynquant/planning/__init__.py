"""Step 3, plan: a quant type for every matrix."""
