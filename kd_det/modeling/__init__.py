"""Distilled meta-architectures, teachers and backbones."""
