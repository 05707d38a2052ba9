"""The loss of sigmoid classifiers (MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE of detectron2's main branch, for LVIS)."""

from typing import Any

import torch
from detectron2.modeling.roi_heads import ROIHeads
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kd_core.losses import DistillationLoss, DKDLoss, KDLoss
from kd_core.losses.checks import as_number
from kd_core.utils.errors import UserError
from kd_det.compat import uses_sigmoid_loss
from kd_det.modeling.aekt import box_predictors


def uses_sigmoid(heads: ROIHeads) -> bool:
    """Whether the box predictors of `heads` are trained by a binary cross-entropy of every foreground class."""
    return any(uses_sigmoid_loss(predictor) for predictor in box_predictors(heads))


class BinaryDKDLoss(DistillationLoss):
    """DKD of K independent binary classifiers (ours: the papers distil a softmax). For a row with target class t,

        kl_c = w_c · KL(b_c^T || b_c^S)        b_c = [p_c, 1 − p_c], p_c = σ(z_c / T), c < K
        w_c  = |p_c^T − p_c^S|^γ               a constant in the backward pass
        tckd = α · T² · mean kl_t              0 on background rows, which have no t < K
        nckd = β · T² · mean Σ_{c ≠ t} kl_c

    With α = β = 1 the sum is KD: the divergence of all K classifiers. It is summed over the classes, as detectron2's
    sigmoid losses are.

    The weight w is BCKD's (arXiv 2308.14286, ICCV 2023; γ 1 there). In BCKD's released code it multiplies the binary
    cross-entropy, and a gradient flows through it; here it multiplies the divergence, whose minimum is 0, and is
    constant (ours).

    Args:
        alpha: α.
        beta: β.
        gamma: γ; 0 for w = 1.
        background_logit: whether the logits are (N, K + 1), the last being that of the background, which these
            classifiers do not train and this loss does not read; else they are (N, K), and a row of the background has
            target K.
        options: `temperature`, `weight`, `warmup`, … of `DistillationLoss`.
    """

    terms = {"tckd": "tcg", "nckd": "ncg"}

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        *,
        gamma: float = 0.0,
        background_logit: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.alpha, self.beta, self.gamma = alpha, beta, as_number(gamma, "gamma")
        self.background_logit = background_logit
        if self.gamma < 0:
            raise ValueError(f"gamma must be 0 or more, not {gamma}: it is the exponent of |p_T − p_S|")

    @property
    def coefficients(self) -> dict[str, float]:
        return {"tckd": self.alpha, "nckd": self.beta}

    def check_num_classes(self, num_classes: int) -> None:
        """One binary classifier is enough."""

    def row_terms(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, k: int) -> dict[str, Tensor]:
        if self.background_logit:
            student_logits, teacher_logits = student_logits[:, :-1], teacher_logits[:, :-1]
        divergence = plain_divergence if torch.compiler.is_compiling() else BinaryDivergence.apply
        own, others = divergence(student_logits, teacher_logits, target, self.temperature, self.gamma)
        return {"tckd": own, "nckd": others}


class BinaryDivergence(torch.autograd.Function):
    """`plain_divergence` for many rows: the anchors of a one-stage detector are 200,000 per image.

    The gradient of KL(b^T || b^S) by the student's logit is p^S − p^T, so one (N, K) matrix is all that the backward
    pass needs. On a CPU the rows are taken in blocks whose intermediates fit into the cache.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, target: Tensor, temperature: float, gamma: float
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(student.dtype, torch.float32)
        index, has_target = target_index(target, student.shape[1])
        slopes = torch.empty_like(student, dtype=dtype)
        own, others = (student.new_empty(len(student), dtype=dtype) for _ in range(2))
        rows = max(BLOCK // max(student.shape[1], 1), 1) if student.device.type == "cpu" else max(len(student), 1)
        inputs = (student, teacher, index, has_target, slopes, own, others)
        for s, t, i, has, slope, own_part, others_part in zip(*(x.split(rows) for x in inputs), strict=True):
            kl, difference = divergence_and_slope(s.to(dtype) / temperature, t.to(dtype) / temperature)
            if gamma:
                weight = difference.abs() if gamma == 1 else difference.abs().pow_(gamma)
                kl.mul_(weight)
                difference.mul_(weight)
            torch.div(difference, temperature, out=slope)
            of_target = kl.gather(1, i).where(has, 0.0)
            own_part.copy_(of_target[:, 0])
            others_part.copy_(kl.scatter_add_(1, i, -of_target).sum(1))
        ctx.save_for_backward(slopes, index, has_target)
        ctx.student_dtype = student.dtype
        return own, others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, own: Tensor, others: Tensor) -> tuple[Tensor | None, ...]:
        slopes, index, has_target = ctx.saved_tensors
        gradient = slopes * others[:, None]
        of_target = slopes.gather(1, index) * own[:, None].where(has_target, others[:, None])
        gradient.scatter_(1, index, of_target)
        return gradient.to(ctx.student_dtype), None, None, None, None


BLOCK = 1 << 15  # logits per block: with its intermediates in a core's L2 cache


def target_index(target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """(N, 1) the class of each row, any class for a row of the background, and whether it has one."""
    return target.clamp(0, num_classes - 1)[:, None], ((target >= 0) & (target < num_classes))[:, None]


def divergence_and_slope(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """`binary_kl`, and its gradient by the student's logit, p^S − p^T.

    With F(z) = log(1 + e^z), KL(b^T || b^S) = F(z^S) − F(z^T) − F'(z^T) · (z^S − z^T). A divergence is the same for the
    opposite outcome, −z, so it is computed for the outcome that the teacher thinks is the rarer one, where nothing
    cancels: a probability of 1e-4 keeps its digits.
    """
    likely = teacher > 0
    teacher = -teacher.abs()
    student = torch.where(likely, -student, student)
    p, q = teacher.sigmoid(), student.sigmoid()
    kl = torch.log1p(-p).sub_(F.logsigmoid(-student)).addcmul_(p, student.sub_(teacher), value=-1.0)
    difference = q.sub_(p)
    return kl, torch.where(likely, -difference, difference)


def plain_divergence(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 1.0, gamma: float = 0.0
) -> tuple[Tensor, Tensor]:
    """kl_t and Σ_{c ≠ t} kl_c of `BinaryDKDLoss`, each (N,), in the plainest way."""
    student, teacher = as_wide(student) / temperature, as_wide(teacher) / temperature
    kl = binary_kl(student, teacher)
    if gamma:
        kl = kl * (teacher.sigmoid() - student.detach().sigmoid()).abs().pow(gamma)
    is_target = target[:, None] == torch.arange(kl.shape[1], device=target.device)
    return kl.where(is_target, 0.0).sum(1), kl.where(~is_target, 0.0).sum(1)


def as_wide(logits: Tensor) -> Tensor:
    """In at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def binary_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL([p, 1 − p] || [q, 1 − q]) of p = σ(teacher), q = σ(student), element by element, in log space."""
    positive = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    return positive + (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))


def binary_form(
    loss: nn.Module, classifier: str = "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", **options: Any
) -> BinaryDKDLoss:
    """The sigmoid counterpart of a softmax loss.

    Args:
        loss: of KD or DKD; a `BinaryDKDLoss` is returned as it is.
        classifier: whose sigmoids they are, for the error message.
        options: more arguments of `BinaryDKDLoss`.

    Raises:
        UserError: a loss other than KD and DKD over the target, or one with a mask or standardized logits.
    """
    if isinstance(loss, BinaryDKDLoss):
        return loss
    target = type(loss) in (KDLoss, DKDLoss) and loss.partition == "target"
    if not target or loss.topk is not None or loss.standardize:
        raise UserError(
            f"{classifier}: {type(loss).__name__} with these settings is defined over a softmax; "
            "a sigmoid classifier takes KD.LOSS.NAME kd, or dkd with DKD.PARTITION target, without TOPK and "
            "STANDARDIZE"
        )
    weights = loss.coefficients
    options = {"temperature": loss.temperature, "weight": loss.weight, "warmup": loss.warmup, **options}
    binary = BinaryDKDLoss(weights["tckd"], weights["nckd"], **options)
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
