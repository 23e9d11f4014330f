"""Training methods, one folder each; `objective.py` is their seat. Nothing is imported before a run asks for it."""
