"""Plans, and the recipes that people know."""
