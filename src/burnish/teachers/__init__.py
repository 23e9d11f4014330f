"""Frozen teachers behind one small protocol."""
