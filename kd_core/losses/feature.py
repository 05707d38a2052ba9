"""The contract of every loss between feature maps, which is used beside a logit loss or alone."""

from collections.abc import Sequence

from torch import Tensor, nn

from kd_core.losses.checks import as_number
from kd_core.schedules import warmup

STREAMS = ("tog", "tcg", "ncg")


class FeatureLoss(nn.Module):
    """Maps the feature maps of a student and a teacher to named terms, whose sum is the loss.

        loss(student_maps, teacher_maps, progress=None) -> {name: value}
        value = weight · warmup(progress) · compare(student_maps, teacher_maps)[name]

    Its parameters train with the student and are no part of it: they are in no student's file, and --resume finds them
    under a key of their own. A subclass names its terms and compares the maps:

        class MeanLoss(FeatureLoss):
            terms = ("mean",)

            def compare(self, student_maps, teacher_maps):
                pairs = zip(student_maps, teacher_maps, strict=True)
                return {"mean": sum(F.mse_loss(s.mean((2, 3)), t.mean((2, 3))) for s, t in pairs)}

    Args:
        weight: factor of every term.
        warmup: share of training progress over which the weight rises linearly from 0.
        stream: whose momentum the gradient has: "tog", "tcg" or "ncg". Ours: "ncg", since it is distillation.

    Raises:
        ValueError: a negative weight, a warm-up outside [0, 1], or an unknown stream.
    """

    terms: tuple[str, ...] = ()

    def __init__(self, weight: float = 1.0, warmup: float = 0.0, stream: str = "ncg") -> None:
        super().__init__()
        self.weight, self.warmup, self.stream = as_number(weight, "weight"), as_number(warmup, "warmup"), stream
        if self.weight < 0:
            raise ValueError(f"weight must not be below 0, and is {weight}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of training progress, in [0, 1], not {warmup}: divide it by max_iter")
        if stream not in STREAMS:
            raise ValueError(f"stream must be one of {', '.join(STREAMS)}, not {stream!r}")

    @property
    def streams(self) -> dict[str, str]:
        """The gradient stream of every term."""
        return dict.fromkeys(self.terms, self.stream)

    def compare(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Every term as a scalar, without weight and warm-up.

        Args:
            student_maps: (N, C_l, H_l, W_l), fine to coarse.
            teacher_maps: the same levels, with channels and sizes of their own; they need no gradient.
        """
        raise NotImplementedError

    def forward(
        self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], progress: float | None = None
    ) -> dict[str, Tensor]:
        """The weighted terms; `progress` is iteration / max_iter, None the end of the training."""
        scale = self.weight * warmup(progress, self.warmup)
        return {name: value * scale for name, value in self.compare(student_maps, teacher_maps).items()}
