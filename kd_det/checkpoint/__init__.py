"""Checkpoints of detectors: written whole, resumed, converted."""
