"""The distilled meta-architectures, each a subclass of detectron2's own."""
