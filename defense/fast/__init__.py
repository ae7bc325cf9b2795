"""The chain and its gradient, fast: written out by hand, low precision, oneDNN, CUDA graphs."""
