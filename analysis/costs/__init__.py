"""Time and memory of a run, estimated."""
