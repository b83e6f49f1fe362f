"""Step 1, calibrate: statistics of the inputs of every matrix."""
