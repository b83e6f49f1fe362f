"""Judges how far architectures are supported, by tiny random checkpoints."""
