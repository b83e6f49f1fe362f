"""The numerics of the dynquant encoder: codeword search, scales, error feedback, descent."""
