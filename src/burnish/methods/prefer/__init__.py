"""Preference optimisation of policies: scores, pairs, losses (CrossVLA, arXiv:2605.21854)."""
