"""What a plan is, and the recipes that people know."""
