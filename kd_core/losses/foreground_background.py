"""One loss for a detector's foreground rows, another for its background rows."""

import torch
from torch import Tensor, nn

from kd_core.losses.checks import check_inputs


class ForegroundBackground(nn.Module):
    """Two losses side by side, each weighted by its share of the N rows:

        loss = N_fg / N · fg_loss(foreground rows) + N_bg / N · bg_loss(background rows)

    The background is the last class, as in detectron2. Terms and streams are those of the parts, prefixed `fg_` and
    `bg_`. GDKD3 and DKD(1, .25) make GDKDS (arXiv 2512.04625, released code). Its loss is fg_loss + bg_loss; the shares
    are ours: with one loss in both places they give that loss of all rows. Picking rows waits for the device.

    Args:
        fg_loss: loss of the rows whose target is not the last class.
        bg_loss: loss of the rows whose target is.
    """

    needs_target = True

    def __init__(self, fg_loss: nn.Module, bg_loss: nn.Module) -> None:
        super().__init__()
        self.fg_loss, self.bg_loss = fg_loss, bg_loss

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"fg": self.fg_loss, "bg": self.bg_loss}

    @property
    def validate(self) -> bool:
        """Whether the target's range is checked, as in `DistillationLoss`."""
        return all(getattr(part, "validate", True) for part in self.parts.values())

    @property
    def streams(self) -> dict[str, str]:
        """The gradient stream of every term."""
        return {f"{side}_{term}": stream for side, part in self.parts.items() for term, stream in part.streams.items()}

    def check_num_classes(self, num_classes: int) -> None:
        """Raise a ValueError where a part makes no sense for this number of classes."""
        for part in self.parts.values():
            part.check_num_classes(num_classes)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        progress: float | None = None,
        *,
        row_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As `DistillationLoss.forward`, which raises the same errors."""
        can_look = self.validate and not torch.compiler.is_compiling()
        check_inputs(student_logits, teacher_logits, target, row_weights, True, can_look)
        background = target == student_logits.shape[1] - 1
        terms = {}
        for side, rows in (("fg", (~background).nonzero()[:, 0]), ("bg", background.nonzero()[:, 0])):
            inputs = (tensor.index_select(0, rows) for tensor in (student_logits, teacher_logits, target))
            weights = None if row_weights is None else row_weights.index_select(0, rows)
            values = self.parts[side](*inputs, progress, row_weights=weights)
            terms.update({f"{side}_{term}": over_all_rows(value, rows, len(target)) for term, value in values.items()})
        return terms


def over_all_rows(value: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """The mean over all rows, 0 where not among `rows`, of a mean over those; or all rows, of those themselves."""
    if value.ndim:
        return value.new_zeros(num_rows).index_copy(0, rows, value)
    return value * (len(rows) / max(num_rows, 1))
