"""The losses as a direct transcription of their formulas: softmax, masks, logarithm, a large constant as a mask.

The papers' code does the same. These are references for the benchmarks only: they return infinities where
kd_core.losses does not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 1000.0


def kd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """T² · mean KL(p^T || p^S)."""
    log_q = F.log_softmax(student / temperature, dim=1)
    p = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(log_q, p, reduction="none").sum(1).mean() * temperature**2


def group_masks(*indices: Tensor, like: Tensor) -> list[Tensor]:
    """A boolean mask (N, C) for each group of class indices (N, K), and one for the rest."""
    masks = [torch.zeros_like(like).scatter_(1, index, 1).bool() for index in indices]
    return [*masks, ~torch.stack(masks).any(0)]


def masses_divergence(student: Tensor, teacher: Tensor, masks: list[Tensor]) -> Tensor:
    """(N,) KL of the summed probabilities."""
    q, p = (torch.stack([(F.softmax(side, dim=1) * mask).sum(1) for mask in masks], 1) for side in (student, teacher))
    return F.kl_div(torch.log(q), p, reduction="none").sum(1)


def within_divergence(student: Tensor, teacher: Tensor, mask: Tensor, kl: str = "forward") -> Tensor:
    """(N,) KL of the conditional distributions of one group."""
    log_q, log_p = (F.log_softmax(side - LARGE * ~mask, dim=1) for side in (student, teacher))
    forward = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    reverse = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1) if kl != "forward" else forward
    return {"forward": forward, "reverse": reverse, "both": (forward + reverse) / 2}[kl]


def dkd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """TCKD + 8 · NCKD."""
    masks = group_masks(target[:, None], like=student)
    student, teacher = student / temperature, teacher / temperature
    rows = masses_divergence(student, teacher, masks) + 8 * within_divergence(student, teacher, masks[1])
    return rows.mean() * temperature**2


def dkd_top1(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """DKD with the teacher's top class as the target."""
    return dkd(student, teacher, teacher.argmax(1))


def dkd_topk(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """DKD with the K = half of the non-target classes that the teacher ranks highest."""
    masks = group_masks(target[:, None], like=student)
    kept = (teacher - LARGE * masks[0]).topk((student.shape[1] - 1 + 1) // 2, dim=1).indices
    student, teacher = student / temperature, teacher / temperature
    nckd = within_divergence(student, teacher, group_masks(kept, like=student)[0])
    return (masses_divergence(student, teacher, masks) + 8 * nckd).mean() * temperature**2


def gdkd(student: Tensor, teacher: Tensor, target: Tensor, kl: str = "forward", temperature: float = 4.0) -> Tensor:
    """GDKD, k 5, w (1, 1, 8)."""
    return top_partition(student, teacher, group_masks(teacher.topk(5, dim=1).indices, like=student), kl, temperature)


def gdkd_both(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """GDKD with the mean of both divergences."""
    return gdkd(student, teacher, target, "both")


def gdkd_auto_k(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """GDKD with a top group of up to 20 classes, its size drawn row by row."""
    p, order = F.softmax(teacher / temperature, dim=1).sort(dim=1)
    ratio = p * torch.arange(1, p.shape[1] + 1, device=p.device) / p.cumsum(1)
    size = ((ratio >= 2).cumsum(1) > 0).sum(1, keepdim=True).clamp(1, 20)
    rank = torch.arange(p.shape[1] - 1, -1, -1, device=p.device)
    top = torch.zeros_like(p).scatter_(1, order, (rank < size).to(p.dtype)).bool()
    return top_partition(student, teacher, [top, ~top], "forward", temperature)


def top_partition(student: Tensor, teacher: Tensor, masks: list[Tensor], kl: str, temperature: float) -> Tensor:
    """masses + within the top + 8 · within the rest."""
    student, teacher = student / temperature, teacher / temperature
    top, rest = (within_divergence(student, teacher, mask, kl) for mask in masks)
    return (masses_divergence(student, teacher, masks) + top + 8 * rest).mean() * temperature**2


def gdkd3(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """GDKD3, k 5, w (1, 1, 1)."""
    top = teacher.topk(5, dim=1).indices
    masks = group_masks(top[:, :1], top[:, 1:], like=student)
    student, teacher = student / temperature, teacher / temperature
    rows = masses_divergence(student, teacher, masks)
    rows = rows + sum(within_divergence(student, teacher, mask) for mask in masks[1:])
    return rows.mean() * temperature**2


def gdkds(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """GDKD3 on the foreground rows, DKD on those of the last class."""
    background = target == student.shape[1] - 1
    share = background.float().mean()
    foreground = gdkd3(student[~background], teacher[~background], target[~background])
    return (1 - share) * foreground + share * dkd(student[background], teacher[background], target[background])


def aekt(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """min(p_t^T / p_t^S, 10) · TCKD + 8 · NCKD."""
    masks = group_masks(target[:, None], like=student)
    student, teacher = student / temperature, teacher / temperature
    q, p = ((F.softmax(side, dim=1) * masks[0]).sum(1) for side in (student, teacher))
    explicit = (p / q).detach().clamp(max=10) * masses_divergence(student, teacher, masks)
    return (explicit + 8 * within_divergence(student, teacher, masks[1])).mean() * temperature**2


def z_score(logits: Tensor) -> Tensor:
    """Logit standardization."""
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + 1e-7)


def dkd_standardized(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """DKD on standardized logits."""
    return dkd(z_score(student), z_score(teacher), target)
