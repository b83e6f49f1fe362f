"""The dynquant encoder: codeword search, scale fitting and error feedback inside ggml's byte layouts."""
