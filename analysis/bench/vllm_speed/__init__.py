"""Measures vLLM itself: tokens a second and memory by scheme."""
