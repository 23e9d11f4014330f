"""Retrieval: a small projection head over frozen features, in which the same moment, or the same task, lies near."""
