"""Checkpoints as tensors: names, sources, exact arithmetic, and task vectors (CapVector) on top of them."""
