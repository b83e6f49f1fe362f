"""Candidates that are compared with their original on pictures, and the questions that both answer."""
