"""The figure by which models of a task are compared."""

# Key of an evaluation's results → the figure in them; a panoptic model has all three, and is compared by the first.
MAIN_FIGURES = {"panoptic_seg": "PQ", "bbox": "AP", "sem_seg": "mIoU"}
