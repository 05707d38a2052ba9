"""MLKD and CRLD: the released values, the papers' identities, and what every loss promises."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

from kd_core.losses import CRLDLoss, DKDLoss, KDLoss, MLKDLoss, TwoViewLoss, standardize_logits
from kd_core.streams import to_streams
from kd_core.topk import TopKSchedule

FILE = json.loads((Path(__file__).resolve().parents[2] / "golden" / "companions.json").read_text())
STUDENT, TEACHER = (torch.tensor(FILE["two_view_inputs"][side], dtype=torch.float64) for side in ("student", "teacher"))
TARGET = torch.tensor(FILE["two_view_inputs"]["target"])
LOSSES = {
    "mlkd": MLKDLoss,
    "mlkd released": lambda **o: MLKDLoss(released=True, **o),
    "mlkd decoupled": lambda **o: MLKDLoss(alpha=1.0, beta=2.0, **o),
    "mlkd topk": lambda **o: MLKDLoss(topk=TopKSchedule(0.4), **o),
    "mlkd standardized": lambda **o: MLKDLoss(standardize=True, **o),
    "crld": lambda **o: CRLDLoss(within_threshold=0.3, **o),
    "crld decoupled": lambda **o: CRLDLoss(within_threshold=0.3, alpha=1.0, beta=0.5, **o),
    "crld topk": lambda **o: CRLDLoss(within_threshold=0.3, topk=TopKSchedule(0.4), **o),
    "crld standardized": lambda **o: CRLDLoss(within_threshold=0.3, standardize=True, **o),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
Views = tuple[Tensor, Tensor]


def batch(rows: int = 8, classes: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Views, Views, Tensor]:
    views = torch.randn(4, rows, classes, dtype=torch.float64).mul(3).to(dtype).unbind()
    return tuple(view.requires_grad_() for view in views[:2]), views[2:], torch.arange(rows) % classes


def gradients_of(value: Tensor, student: Views) -> Views:
    return torch.autograd.grad(value, student, retain_graph=True)


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(N,) T² KL(p^T || p^S), class by class."""
    p, log_q = (teacher / temperature).softmax(1), (student / temperature).log_softmax(1)
    return temperature**2 * (p * (p.log() - log_q)).sum(1)


def slow_mlkd(student: Views, teacher: Views, loss: MLKDLoss) -> dict[str, Tensor]:
    """The formula, matrix by matrix."""
    n, classes = student[0].shape
    p = teacher[0].softmax(1)
    rows = p.max(1).values <= p.max(1).values.quantile(0.5)
    columns = p.sum(0) <= p.sum(0).quantile(0.5)
    total = {"instance": 0.0, "class": 0.0, "batch": 0.0}
    for t in loss.temperatures:
        for view in (0, 1):
            total["instance"] += kl(student[view], teacher[view], t)[rows if view == 0 else slice(None)].sum() / n
            q, r = (teacher[view] / t).softmax(1), (student[view] / t).softmax(1)
            by_class, by_row = (q.T @ q - r.T @ r) ** 2, (q @ q.T - r @ r.T) ** 2
            total["class"] += by_class[:, columns if view == 0 else slice(None)].sum() / classes
            total["batch"] += by_row[:, rows if view == 0 else slice(None)].sum() / n
    return {name: loss.weight * value for name, value in total.items()}


@pytest.mark.parametrize(("key", "loss"), [("mlkd_released", MLKDLoss(released=True)), ("crld", CRLDLoss())])
def test_value_and_gradient_are_those_of_the_released_code(key: str, loss: TwoViewLoss) -> None:
    student = STUDENT.clone().requires_grad_()
    value = sum(loss(student.unbind(), TEACHER.unbind(), TARGET).values())
    assert value.item() == pytest.approx(FILE[key]["value"], abs=1e-9)
    golden = torch.tensor(FILE[key]["grad"], dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], golden, rtol=0, atol=1e-9)


def test_the_parts_of_the_released_mlkd_are_its_terms() -> None:
    terms = MLKDLoss(released=True)(STUDENT.unbind(), TEACHER.unbind(), TARGET)
    parts = FILE["mlkd_released"]["parts"]
    assert (terms["tckd"] + terms["nckd"]).item() == pytest.approx(parts["loss_kd"], abs=1e-9)
    assert terms["class"].item() == pytest.approx(parts["loss_cc"], abs=1e-9)
    assert terms["batch"].item() == pytest.approx(parts["loss_bc"], abs=1e-9)


@pytest.mark.parametrize("rows", [7, 8])
def test_mlkd_is_the_formula(rows: int) -> None:
    student, teacher, target = batch(rows)
    loss = MLKDLoss()
    terms, slow = loss(student, teacher, target), slow_mlkd(student, teacher, loss)
    torch.testing.assert_close(terms["tckd"] + terms["nckd"], slow["instance"])
    for name in ("class", "batch"):
        torch.testing.assert_close(terms[name], slow[name])
    torch.testing.assert_close(gradients_of(sum(terms.values()), student), gradients_of(sum(slow.values()), student))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_strong_view_of_mlkd_at_one_temperature_is_kd(temperature: float) -> None:
    student, teacher, target = batch()
    terms = MLKDLoss([temperature], weight=1.0)(student, (student[0].detach(), teacher[1]), target)
    kd = KDLoss(temperature)(student[1], teacher[1], target)
    for name in ("tckd", "nckd"):
        torch.testing.assert_close(terms[name], kd[name])


def test_mlkd_without_a_mask_is_kd_of_both_views() -> None:
    student, teacher, target = batch()
    uniform = torch.zeros_like(teacher[0])  # every row is at the median of equal confidences
    terms = MLKDLoss([3.0], weight=1.0)(student, (uniform, teacher[1]), target)
    views = [KDLoss(3.0)(student[0], uniform, target), KDLoss(3.0)(student[1], teacher[1], target)]
    for name in ("tckd", "nckd"):
        torch.testing.assert_close(terms[name], views[0][name] + views[1][name])


def test_the_class_term_of_few_classes_has_a_weight_of_its_own() -> None:
    student, teacher, target = batch()
    plain = MLKDLoss()(student, teacher, target)
    weighted = MLKDLoss(class_weight=0.01, batch_weight=3.0)(student, teacher, target)
    factors = {"tckd": 1, "nckd": 1, "class": 0.01, "batch": 3}
    for name, factor in factors.items():
        torch.testing.assert_close(weighted[name], factor * plain[name])
    sizes = []
    for classes in (10, 100):  # one-hot teachers, uniform students: (N / C)²
        logits, labels = torch.zeros(60, classes), torch.arange(60) % 10
        views = (1e4 * torch.nn.functional.one_hot(labels, classes).float(),) * 2
        sizes.append(MLKDLoss(released=True)((logits, logits), views, labels)["class"])
    assert sizes[0] > 5 * sizes[1]


def test_crld_of_equal_views_and_no_threshold_is_kd_times_its_weights() -> None:
    student, teacher, target = batch()
    loss = CRLDLoss(within_weight=2.0, cross_weight=0.5, within_threshold=0.0, cross_threshold=0.0)
    terms, kd = loss((student[0],) * 2, (teacher[0],) * 2, target), KDLoss()(student[0], teacher[0], target)
    torch.testing.assert_close(sum(terms.values()), (2 * 2.0 + 2 * 0.5) * sum(kd.values()))
    for group, weight in (("within", 4.0), ("cross", 1.0)):
        for part in ("tckd", "nckd"):
            torch.testing.assert_close(terms[f"{group}_{part}"], weight * kd[part])


def test_crld_counts_rows_by_the_teacher_s_confidence_in_either_view() -> None:
    student, teacher, target = batch()
    weak, strong = (view.softmax(1).amax(1) for view in teacher)
    loss = CRLDLoss(2.0, 3.0, 5.0, within_threshold=weak.median().item(), cross_threshold=strong.median().item())
    terms = loss(student, teacher, target)
    within = (kl(student[0], teacher[0], 2.0) + kl(student[1], teacher[1], 2.0))[weak >= weak.median()].sum() / 8
    cross = (kl(student[1], teacher[0], 2.0) + kl(student[0], teacher[1], 2.0))[strong >= strong.median()].sum() / 8
    torch.testing.assert_close(terms["within_tckd"] + terms["within_nckd"], 3.0 * within)
    torch.testing.assert_close(terms["cross_tckd"] + terms["cross_nckd"], 5.0 * cross)


def test_alpha_and_beta_make_every_divergence_a_dkd() -> None:
    student, teacher, target = batch()
    dkd = DKDLoss(0.5, 2.0)(student[0], teacher[0], target)
    crld = CRLDLoss(within_threshold=0.0, cross_threshold=0.0, alpha=0.5, beta=2.0)
    terms = crld((student[0],) * 2, (teacher[0],) * 2, target)
    torch.testing.assert_close(terms["within_nckd"], 4.0 * dkd["nckd"])
    torch.testing.assert_close(terms["cross_tckd"], 1.0 * dkd["tckd"])
    mlkd = MLKDLoss([4.0], weight=1.0, alpha=0.5, beta=2.0)
    terms = mlkd((student[1], student[0]), (student[1].detach(), teacher[0]), target)  # the weak view's rows are equal
    torch.testing.assert_close([terms["tckd"], terms["nckd"]], list(dkd.values()))


def test_the_mask_keeps_the_teacher_s_top_classes_and_admits_all_at_the_end() -> None:
    student, teacher, target = batch()
    for make in (MLKDLoss, CRLDLoss):
        masked, plain = make(topk=TopKSchedule(0.4)), make()
        torch.testing.assert_close(masked(student, teacher, target, 1.0), plain(student, teacher, target))
        assert any(v != plain(student, teacher, target)[n] for n, v in masked(student, teacher, target, 0.0).items())
    one, early = (student[0],) * 2, 0.0
    terms = CRLDLoss(within_threshold=0.0, topk=TopKSchedule(0.4))(one, (teacher[0],) * 2, target, early)
    kd = KDLoss(topk=TopKSchedule(0.4))(student[0], teacher[0], target, early)
    torch.testing.assert_close(terms["within_nckd"], 4.0 * kd["nckd"])


def test_standardization_acts_on_the_divergences() -> None:
    student, teacher, target = batch()
    z = [standardize_logits(s.detach(), t) for s, t in zip(student, teacher, strict=True)]
    standardized = MLKDLoss([2.0], standardize=True)(student, teacher, target)
    strong = KDLoss(2.0, weight=0.5)(*z[1], target)["tckd"]
    rows = teacher[0].softmax(1).amax(1)
    weights = (rows <= rows.median()).double()
    weak = KDLoss(2.0, weight=0.5)(*z[0], target, row_weights=weights)["tckd"]
    torch.testing.assert_close(standardized["tckd"], strong + weak)
    torch.testing.assert_close(standardized["class"], MLKDLoss([2.0])(student, teacher, target)["class"])
    crld = CRLDLoss(2.0, cross_weight=0.0, within_threshold=0.0, standardize=True)(student, teacher, target)
    kd = KDLoss(2.0, standardize=True)
    both = [kd(s, t, target)["nckd"] for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(crld["within_nckd"], 2.0 * sum(both))


@every_loss
def test_terms_are_named_scalars_with_a_stream_each(name: str) -> None:
    student, teacher, target = batch()
    loss = LOSSES[name]()
    terms = loss(student, teacher, target)
    assert set(terms) == set(loss.streams) == set(loss.coefficients)
    assert loss.views == 2
    assert all(term.shape == () and term.dtype == torch.float64 and term > 0 for term in terms.values())
    for term, stream in loss.streams.items():
        assert stream == {"tckd": "tcg", "nckd": "ncg"}.get(term.split("_")[-1], "tog")


@every_loss
def test_the_gradients_of_the_streams_add_up_to_that_of_the_loss(name: str) -> None:
    student, teacher, target = batch()
    loss = LOSSES[name]()
    terms = loss(student, teacher, target, 0.2)
    whole = gradients_of(sum(terms.values()), student)
    streams = to_streams(terms, loss)
    assert set(streams) == set(loss.streams.values())
    parts = [gradients_of(value, student) for value in streams.values()]
    for view in (0, 1):
        torch.testing.assert_close(sum(part[view] for part in parts), whole[view], rtol=0, atol=1e-10)


@every_loss
def test_gradcheck_of_every_term(name: str) -> None:
    student, teacher, target = batch(rows=4, classes=5)
    loss = LOSSES[name]()
    assert gradcheck(lambda *views: tuple(loss(views, teacher, target, 0.2).values()), student)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4, 1e30])
def test_terms_and_gradients_are_finite(name: str, dtype: torch.dtype, size: float) -> None:
    student, teacher, target = batch()
    largest = min(size, torch.finfo(dtype).max / 16)
    student = tuple((view.detach() * largest).to(dtype).requires_grad_() for view in student)
    teacher = tuple((view * largest).to(dtype) for view in teacher)
    teacher[0][:, 3] = -torch.inf if "standardized" not in name else 0
    terms = LOSSES[name]()(student, teacher, target, 0.2)
    assert all(term.isfinite() and term >= 0 for term in terms.values())
    for gradient in gradients_of(sum(terms.values()), student):
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()


@every_loss
def test_equal_logits_give_zero_with_zero_gradient(name: str) -> None:
    student, _, target = batch()
    views = (student[0],) * 2 if "crld" in name else student  # across different views nothing is equal
    terms = LOSSES[name]()(views, tuple(view.detach().clone() for view in views), target)
    assert all(term.item() == 0 for term in terms.values())
    for gradient in torch.autograd.grad(sum(terms.values()), set(views)):
        assert gradient.count_nonzero() == 0


@every_loss
def test_no_rows_give_zero_with_a_gradient(name: str) -> None:
    student, teacher, target = batch(rows=0)
    terms = LOSSES[name]()(student, teacher, target)
    assert all(term.item() == 0 for term in terms.values())
    assert all(gradient.shape == (0, 7) for gradient in gradients_of(sum(terms.values()), student))


@every_loss
def test_autocast_and_half_precision_compute_in_float32(name: str) -> None:
    student, teacher, target = batch(dtype=torch.bfloat16)
    loss = LOSSES[name]()
    wide = loss(tuple(v.detach().float() for v in student), tuple(v.float() for v in teacher), target)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(student, teacher, target) == wide


def test_torch_compile_gives_the_same_numbers() -> None:
    student, teacher, target = batch(dtype=torch.float32)
    loss = LOSSES["mlkd topk"](warmup=0.5)
    eager = loss(student, teacher, target, 0.3)
    loss.compile(backend="eager")
    torch.testing.assert_close(loss(student, teacher, target, 0.3), eager)
    assert loss.compiled_terms.is_compiled


def test_the_teacher_s_top_class_in_place_of_the_label_needs_no_label() -> None:
    student, teacher, _ = batch()
    for make in (MLKDLoss, CRLDLoss):
        terms = make(partition="teacher_top1")(student, teacher, None)
        labelled = make()(student, teacher, teacher[1].argmax(1))
        torch.testing.assert_close(sum(terms.values()), sum(labelled.values()))


@every_loss
def test_no_number_is_read_by_the_host(name: str) -> None:
    with FakeTensorMode():  # a CUDA of tensors without numbers, where reading one raises
        views = torch.empty(4, 8, 7, device="cuda").unbind()
        terms = LOSSES[name]()(views[:2], views[2:], torch.empty(8, dtype=torch.long, device="cuda"), 0.2)
        assert all(term.shape == () for term in terms.values())


@every_loss
def test_weight_and_warm_up_scale_every_term(name: str) -> None:
    student, teacher, target = batch()
    plain, scaled = LOSSES[name](weight=1.0), LOSSES[name](weight=3.0, warmup=0.5)
    for progress, share in ((0.0, 0.0), (0.1, 0.2), (0.5, 1.0), (None, 1.0)):
        expected = plain(student, teacher, target, progress)
        for term, value in scaled(student, teacher, target, progress).items():
            torch.testing.assert_close(value, 3 * share * expected[term])


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher, target = batch()
    teacher = tuple(view.clone().requires_grad_() for view in teacher)
    for make in (MLKDLoss, CRLDLoss):
        sum(make()(student, teacher, target).values()).backward()
    assert all(view.grad is None for view in teacher)
    assert all(view.grad.abs().sum() > 0 for view in student)


@pytest.mark.parametrize("make", [MLKDLoss, CRLDLoss])
def test_bad_input_is_named(make: type[TwoViewLoss]) -> None:
    student, teacher, target = batch()
    cases = [
        ((student[0], teacher, target), r"student_logits must be \(weak, strong\), two \(N, C\) tensors, not"),
        ((student, teacher[:1], target), r"teacher_logits must be \(weak, strong\), two .* tensors, not \[\(8, 7\)\]"),
        ((student, (teacher[0], teacher[1][:, :5]), target), r"teacher_logits are \(8, 5\) but student_logits are"),
        ((student, teacher, target[:3]), r"target must be \(8,\), one class index per row, not \(3,\)"),
        ((student, teacher, None), "target must be an .* tensor of class indices, not None"),
        ((student, teacher, target, -0.1), r"progress is iteration / max_iter, in \[0, 1\], not -0.1"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            make()(*arguments)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (MLKDLoss, {"temperatures": ()}, r"temperatures must be one or more numbers above 0, not \[\]"),
        (MLKDLoss, {"temperatures": (4.0, -1.0)}, r"must be one or more numbers above 0, not \[4.0, -1.0\]"),
        (MLKDLoss, {"weight": "half"}, "weight must be a number, not 'half'"),
        (MLKDLoss, {"reduction": "none"}, "terms over the whole batch: reduction must be 'mean', not 'none'"),
        (CRLDLoss, {"chunk_rows": 4}, "CRLDLoss has terms over the whole batch: leave chunk_rows out, not 4"),
        (CRLDLoss, {"temperature": 0.0}, "temperature must be above 0, not 0.0"),
        (CRLDLoss, {"within_threshold": 90.0}, r"within_threshold is a confidence, in \[0, 1\], not 90.0"),
        (CRLDLoss, {"cross_weight": None}, "cross_weight must be a number, not None"),
        (CRLDLoss, {"beta": "two"}, "beta must be a number, not 'two'"),
    ],
)
def test_bad_options_are_named(make: type[TwoViewLoss], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("kind", [MLKDLoss, CRLDLoss])
def test_views_of_different_shapes_are_refused(kind):
    views = (torch.randn(3, 6), torch.randn(5, 6))
    with pytest.raises(ValueError, match=r"the weak and the strong view must have one shape, not \(3, 6\) and"):
        kind(partition="teacher_top1")(views, views, None)
