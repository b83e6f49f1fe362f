"""Step 6, release: a family of files of one model, its card, and their way to the Hub."""
