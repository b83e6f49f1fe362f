"""Step 2b: what an error in each matrix costs in KL divergence."""
