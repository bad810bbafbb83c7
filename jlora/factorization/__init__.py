"""Matrix → SVD."""
