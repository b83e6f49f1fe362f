"""Memory that a file takes where it runs: a budget for plans, and a placement on GPU and host."""
