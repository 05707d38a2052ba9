"""The trainer, its step, its hooks, and how a training is launched."""
