"""Super weights, super experts and tensors that stand out."""
