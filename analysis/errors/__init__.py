"""Step 2a: the error of every matrix in every quant type."""
