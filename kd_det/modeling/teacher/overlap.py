"""The teacher's backbone beside the student's forward pass, on a CUDA stream of its own."""

from collections.abc import Callable
from functools import cache

import torch

from kd_det.modeling.teacher.view import TeacherView


class ViewAhead:
    """A `TeacherView` that a CUDA device begins to compute now, and any other device when it is asked for.

    Its kernels are queued on a second stream, which first waits for what the current stream holds: weights and images.
    `take` makes the current stream wait for them, never the host. The feature maps are memory of the second stream:
    `record_stream` keeps them from being handed out again before the current stream has read them.

    Args:
        device: the student's.
        make: makes the view, from tensors that outlive `take`.
    """

    def __init__(self, device: torch.device, make: Callable[[], TeacherView]) -> None:
        self.device, self.make = device, make
        if device.type == "cuda":
            second_stream(device).wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(second_stream(device)):
                view = make()
            self.make = lambda: view

    def take(self) -> TeacherView:
        """The view, for use on the current stream; it is not kept here."""
        view, self.make = self.make(), None
        if self.device.type == "cuda":
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(second_stream(self.device))
            for feature in view.features.values():
                feature.record_stream(current)
        return view


@cache
def second_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream beside the current one for each device."""
    return torch.cuda.Stream(device)
