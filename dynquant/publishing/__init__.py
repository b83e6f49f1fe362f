"""Step 8. A family of files of one model, its card, and their way to the Hub."""
