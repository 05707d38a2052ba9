"""The loss of sigmoid classifiers (MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE of detectron2's main branch, for LVIS)."""

from typing import Any

import torch
from detectron2.modeling.roi_heads import ROIHeads
from torch import Tensor, nn
from torch.nn import functional as F

from kd_core.losses import DistillationLoss, DKDLoss, KDLoss
from kd_core.utils.errors import UserError
from kd_det.compat import uses_sigmoid_loss
from kd_det.modeling.aekt import box_predictors


def uses_sigmoid(heads: ROIHeads) -> bool:
    """Whether the box predictors of `heads` are trained by a binary cross-entropy of every foreground class."""
    return any(uses_sigmoid_loss(predictor) for predictor in box_predictors(heads))


class BinaryDKDLoss(DistillationLoss):
    """DKD of K independent binary classifiers (ours: the papers distil a softmax). For a row with target class t,

        kl_c = KL(b_c^T || b_c^S)              b_c = [σ(z_c / T), 1 − σ(z_c / T)], c < K
        tckd = α · T² · mean kl_t              0 on background rows, which have no t < K
        nckd = β · T² · mean Σ_{c ≠ t} kl_c

    With α = β = 1 the sum is KD: the divergence of all K classifiers. It is summed over the classes, as detectron2's
    sigmoid loss is. The background's logit, which that loss does not train, is not read.

    Args:
        alpha: α.
        beta: β.
        options: `temperature`, `weight`, `warmup` of `DistillationLoss`.
    """

    terms = {"tckd": "tcg", "nckd": "ncg"}

    def __init__(self, alpha: float = 1.0, beta: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.alpha, self.beta = alpha, beta

    @property
    def coefficients(self) -> dict[str, float]:
        return {"tckd": self.alpha, "nckd": self.beta}

    def row_terms(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, k: int) -> dict[str, Tensor]:
        kl = binary_kl(*(as_wide(z[:, :-1]) / self.temperature for z in (student_logits, teacher_logits)))
        is_target = target[:, None] == torch.arange(kl.shape[1], device=target.device)
        return {"tckd": kl.where(is_target, 0.0).sum(1), "nckd": kl.where(~is_target, 0.0).sum(1)}


def as_wide(logits: Tensor) -> Tensor:
    """In at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def binary_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL([p, 1 − p] || [q, 1 − q]) of p = σ(teacher), q = σ(student), element by element, in log space."""
    positive = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    return positive + (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))


def binary_form(loss: nn.Module) -> BinaryDKDLoss:
    """The sigmoid counterpart of a softmax loss.

    Raises:
        UserError: a loss other than KD and DKD over the target, or one with a mask or standardized logits.
    """
    if isinstance(loss, BinaryDKDLoss):
        return loss
    target = type(loss) in (KDLoss, DKDLoss) and loss.partition == "target"
    if not target or loss.topk is not None or loss.standardize:
        raise UserError(
            f"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE: {type(loss).__name__} with these settings is defined over a softmax; "
            "a sigmoid classifier takes KD.LOSS.NAME kd, or dkd with DKD.PARTITION target, without TOPK and "
            "STANDARDIZE"
        )
    weights = loss.coefficients
    binary = BinaryDKDLoss(
        weights["tckd"], weights["nckd"], temperature=loss.temperature, weight=loss.weight, warmup=loss.warmup
    )
    if loss.compiled_terms is not None:
        binary.compile()
    return binary


def check_same_classifier(student: ROIHeads, teacher: ROIHeads) -> None:
    """Raise a UserError unless both classify by a softmax, or both by sigmoids."""
    ours, theirs = uses_sigmoid(student), uses_sigmoid(teacher)
    if ours != theirs:
        words = {False: "a softmax over all classes", True: "one sigmoid per class (USE_SIGMOID_CE)"}
        raise UserError(
            f"The student classifies by {words[ours]}, its teacher by {words[theirs]}: logits of one cannot be "
            "distilled into the other; set MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE alike in both configs"
        )
