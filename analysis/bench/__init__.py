"""Measurements that are run by hand: encoders, generation, training."""
