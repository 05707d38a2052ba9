"""Losses and optimizers of knowledge distillation. Needs torch and fvcore only."""
