"""`plan --select`: plans are priced, rendered and scored by running the model, and the best is taken."""
