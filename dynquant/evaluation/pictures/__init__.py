"""Candidates that are compared with their original on pictures."""
