"""Every config key of kd_det, and how files and options are merged into a config."""
