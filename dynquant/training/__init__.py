"""Step 7, heal and finetune: adapters trained on a packed model."""
