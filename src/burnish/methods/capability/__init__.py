"""Task vectors (CapVector's capability vectors, arXiv 2605.10903) that a fine-tune is to keep; weights/ makes them."""
