"""COCO evaluation, tables of runs, and pictures of detections."""
