"""Speed of llama.cpp on one GPU, on files of random weights."""
