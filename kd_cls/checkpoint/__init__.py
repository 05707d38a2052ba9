"""Checkpoints of classifiers: how they are written and loaded, and when a run may resume from one."""
