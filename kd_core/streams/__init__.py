"""Streams of gradients: their backward passes (`backward.py`), and their memory until the step (`gradients.py`).

    from kd_core.streams import backward_streams, to_streams
    backward_streams(to_streams(terms, loss, task_loss=task_loss), optimizer)
"""

from kd_core.streams.backward import MOMENTUM_TOLERANCE, TASK_STREAM, backward_streams, stream_sets, to_streams
from kd_core.streams.gradients import StreamGradients, StreamSets

__all__ = [
    "MOMENTUM_TOLERANCE",
    "TASK_STREAM",
    "StreamGradients",
    "StreamSets",
    "backward_streams",
    "stream_sets",
    "to_streams",
]
