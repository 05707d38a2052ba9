"""Data sets of kd_det."""
