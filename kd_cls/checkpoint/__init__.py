"""Checkpoints of classifiers: written whole, loaded, resumed."""
