"""Measurements of planning: plans from drawn rows, and the time of several sizes."""
