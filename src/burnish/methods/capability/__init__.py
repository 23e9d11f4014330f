"""Capability vectors: extract, inspect, merge and keep what a fine-tune has learnt (CapVector, arXiv 2605.10903)."""
