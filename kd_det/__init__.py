"""The detectron2 extension."""
