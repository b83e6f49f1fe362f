"""Agreement of the two runtimes on one model: whether a file computes what its directory computes."""
