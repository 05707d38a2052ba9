"""Losses and optimizers of knowledge distillation. Needs torch, numpy and fvcore only."""
