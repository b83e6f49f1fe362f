"""Tasks beside text: multiple-choice questions, and what a model writes itself."""
