"""Step 6, heal and finetune: adapters trained on a packed model."""
