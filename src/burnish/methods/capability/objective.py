"""Regularised fine-tuning that keeps a merged capability vector (to be filled)."""
