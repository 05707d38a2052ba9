"""Distillation of image classifiers, on timm."""
