"""What every loss promises: finite numbers, dtypes, streams, empty batches, errors."""

import copy
import logging
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from kd_core.losses import AEKTLoss, DKDLoss, ForegroundBackground, GDKD3Loss, GDKDLoss, KDLoss, base
from kd_core.partition_blocks import work_dtype
from kd_core.topk import TopKSchedule

LOSSES = {
    "kd": KDLoss,
    "kd topk": lambda **o: KDLoss(topk=TopKSchedule(0.4), **o),
    "kd standardized": lambda **o: KDLoss(standardize=True, **o),
    "dkd": DKDLoss,
    "dkd topk": lambda **o: DKDLoss(topk=TopKSchedule(0.4), **o),
    "dkd top-1": lambda **o: DKDLoss(partition="teacher_top1", **o),
    "gdkd": lambda **o: GDKDLoss(k=2, **o),
    "gdkd reverse": lambda **o: GDKDLoss(k=2, kl="reverse", **o),
    "gdkd both": lambda **o: GDKDLoss(k=2, kl="both", **o),
    "gdkd auto-k": lambda **o: GDKDLoss(k=2, auto_k=True, **o),
    "gdkd standardized": lambda **o: GDKDLoss(k=2, standardize=True, **o),
    "gdkd3": lambda **o: GDKD3Loss(k=3, **o),
    "aekt": AEKTLoss,
    "aekt topk": lambda **o: AEKTLoss(topk=TopKSchedule(0.4), **o),
    "gdkds": lambda **o: ForegroundBackground(GDKD3Loss(k=3, **o), DKDLoss(**o)),
}
FAR = torch.tensor([[1e30, -1e30, 0.0, 2e29, -1e29]])
every_loss = pytest.mark.parametrize("name", LOSSES)


def batch(rows: int = 7, classes: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = torch.randn(2, rows, classes, dtype=torch.float64).mul(3).to(dtype).unbind()
    target = torch.arange(rows) % classes
    return student.requires_grad_(), teacher, target


def gradient_of(terms: dict[str, Tensor], student: Tensor) -> Tensor:
    return torch.autograd.grad(sum(terms.values()), student, retain_graph=True)[0]


@every_loss
def test_gradcheck_of_every_term(name: str) -> None:
    student, teacher, target = batch(classes=6)
    loss = LOSSES[name](temperature=2.0)
    if name.startswith("aekt"):  # its ratio is a constant to the gradient by definition, which numbers cannot see
        loss.explicit = lambda parts: parts.mass
    assert gradcheck(lambda logits: tuple(loss(logits, teacher, target, 0.2).values()), (student,))


@every_loss
def test_terms_are_named_scalars_with_a_stream_each(name: str) -> None:
    student, teacher, target = batch()
    loss = LOSSES[name]()
    terms = loss(student, teacher, target)
    assert set(terms) == set(loss.streams)
    assert set(loss.streams.values()) == {"tcg", "ncg"}
    assert all(term.shape == () and term.dtype == torch.float64 and term.item() > 0 for term in terms.values())
    assert not list(loss.parameters()) and not loss.state_dict()


@every_loss
def test_the_gradients_of_the_terms_add_up_to_that_of_the_sum(name: str) -> None:
    student, teacher, target = batch()
    terms = LOSSES[name]()(student, teacher, target, 0.2)
    alone = [torch.autograd.grad(term, student, retain_graph=True)[0] for term in terms.values()]
    torch.testing.assert_close(sum(alone), gradient_of(terms, student))


@st.composite
def logits_of_any_kind(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float]:
    """Logits of random shape, dtype and size, from nearly equal to as far apart as the contract goes."""
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    rows, classes = draw(st.integers(1, 5)), draw(st.integers(4, 12))
    largest = min(1e30, torch.finfo(dtype).max)
    sizes = [draw(st.sampled_from([1e-3, 1.0, 10.0, 300.0, 6e4, largest])) for _ in range(2)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    power = draw(st.sampled_from([0, 1, 9]))  # only signs; evenly spread; a few large ones
    noise = torch.rand(2, rows, classes, generator=generator, dtype=torch.float64) * 2 - 1
    student, teacher = (noise[i].sign() * noise[i].abs() ** power * sizes[i] for i in range(2))
    if draw(st.booleans()):
        teacher = student + teacher / sizes[1] * 1e-3
    target = torch.randint(classes, (rows,), generator=generator)
    temperature = draw(st.sampled_from([0.5, 1.0, 4.0, 20.0]))
    student, teacher = (side.clamp(-largest, largest).to(dtype) for side in (student, teacher))
    return student.requires_grad_(), teacher, target, temperature


@every_loss
@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(inputs=logits_of_any_kind())
@example(inputs=(FAR.clone().requires_grad_(), -FAR, torch.tensor([0]), 1.0))
def test_terms_and_gradients_are_finite_not_negative_and_blind_to_a_shift(
    name: str, inputs: tuple[Tensor, Tensor, Tensor, float]
) -> None:
    student, teacher, target, temperature = inputs
    if "standardized" in name:
        temperature = min(temperature, 4.0)  # a gradient of T / std is as large as float16 is asked to hold
    if student.dtype == torch.float16 and ("reverse" in name or "both" in name):
        teacher = teacher.clamp(-1e3, 1e3)  # the reverse gradient is as large as the teacher's gaps
    terms = LOSSES[name](temperature=temperature)(student, teacher, target, 0.2)
    for term in terms.values():
        assert term.isfinite()
        assert term >= -1e-6
        gradient = torch.autograd.grad(term, student, retain_graph=True)[0]
        assert gradient.dtype == student.dtype
        assert gradient.isfinite().all()
    factor = temperature
    if "standardized" in name:  # whose gradient is divided by the logits' spread
        factor /= student.detach().double().std(1).min().clamp(1e-7, 1).item()
    if "reverse" in name or "both" in name:  # whose gradient holds log ratios, not probabilities alone
        factor *= 1 + (student.detach().double().abs().max() + teacher.double().abs().max()).item() / temperature
    assert_sums_to_zero(gradient_of(terms, student), factor)


def assert_sums_to_zero(gradient: Tensor, factor: float) -> None:
    """Rows sum to 0, to the rounding of the gradient's dtype and of that the loss was computed in, times `factor`."""
    stored, computed = torch.finfo(gradient.dtype), torch.finfo(work_dtype(gradient))
    rounding = gradient.double().abs().sum(1) * stored.eps + gradient.shape[1] * stored.tiny * stored.eps
    assert (gradient.double().sum(1).abs() <= rounding + 100 * factor * computed.eps).all()


@every_loss
def test_half_precision_is_computed_as_in_float32(name: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        student, teacher, target = batch(dtype=dtype)
        wide = student.detach().float().requires_grad_()
        loss = LOSSES[name]()
        narrow_terms, wide_terms = loss(student, teacher, target), loss(wide, teacher.float(), target)
        assert narrow_terms == wide_terms
        assert torch.equal(gradient_of(narrow_terms, student), gradient_of(wide_terms, wide).to(dtype))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    student, teacher, target = batch(dtype=torch.float32)
    loss = LOSSES[name]()
    outside = loss(student, teacher, target)
    with torch.autocast("cpu", dtype):
        inside = loss(student, teacher, target)
        gradient = gradient_of(inside, student)
    assert inside == outside
    assert torch.equal(gradient, gradient_of(outside, student))


@every_loss
def test_no_rows_give_zero_with_a_gradient(name: str) -> None:
    student, teacher, target = batch(rows=0)
    terms = LOSSES[name]()(student, teacher, target)
    assert all(term.item() == 0 for term in terms.values())
    assert gradient_of(terms, student).shape == (0, 7)


@every_loss
def test_equal_logits_give_zero_with_zero_gradient(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        student, _, target = batch(dtype=dtype)
        terms = LOSSES[name]()(student, student.detach().clone(), target)
        assert all(term.item() == 0 for term in terms.values())
        assert gradient_of(terms, student).count_nonzero() == 0


@every_loss
def test_adding_a_constant_to_a_row_changes_nothing(name: str) -> None:
    student, teacher, target = batch()
    loss = LOSSES[name]()
    terms = loss(student, teacher, target)
    shift = torch.randn(len(student), 1, dtype=torch.float64) * 10
    moved = loss(student + shift, teacher - 2 * shift, target)
    for term in terms:
        torch.testing.assert_close(moved[term], terms[term])


@every_loss
def test_the_teacher_gets_no_gradient(name: str) -> None:
    student, teacher, target = batch()
    teacher.requires_grad_()
    sum(LOSSES[name]()(student, teacher, target).values()).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@every_loss
def test_memory_layout_and_a_wider_teacher_change_nothing(name: str) -> None:
    student, teacher, target = batch()
    loss = LOSSES[name]()
    terms = loss(student, teacher, target)
    transposed = student.detach().t().contiguous().t().requires_grad_()
    assert not transposed.is_contiguous()
    strided = torch.stack([teacher, teacher], 2)[..., 0]
    moved = loss(transposed, strided, target.int())
    torch.testing.assert_close(list(moved.values()), list(terms.values()))
    torch.testing.assert_close(gradient_of(moved, transposed), gradient_of(terms, student))
    narrow = student.detach().float().requires_grad_()
    mixed = loss(narrow, teacher, target)
    assert all(term.dtype == torch.float64 for term in mixed.values())
    assert gradient_of(mixed, narrow).dtype == torch.float32


@every_loss
def test_row_weights_may_be_made_in_inference_mode(name: str) -> None:
    """As from a teacher's confidence."""
    student, teacher, target = batch()
    with torch.inference_mode():
        weights = torch.rand(len(target), dtype=torch.float64)
    assert gradient_of(LOSSES[name]()(student, teacher, target, row_weights=weights), student).isfinite().all()


@every_loss
def test_row_weights_weight_the_rows(name: str) -> None:
    student, teacher, target = batch()
    loss = LOSSES[name]()
    weights = torch.tensor([0.0, 2.0, 1.0, 0.5, 0.0, 3.0, 1.5])
    weighted = loss(student, teacher, target, row_weights=weights)
    rows = [loss(student[i : i + 1], teacher[i : i + 1], target[i : i + 1]) for i in range(len(student))]
    for term in weighted:
        by_hand = sum(weight * row[term] for weight, row in zip(weights, rows, strict=True)) / len(rows)
        torch.testing.assert_close(weighted[term], by_hand)


@pytest.mark.parametrize("make", [KDLoss, DKDLoss, GDKD3Loss, AEKTLoss])
def test_weight_and_warm_up_scale_every_term(make: type[nn.Module]) -> None:
    student, teacher, target = batch()
    plain, scaled = make()(student, teacher, target), make(weight=3.0, warmup=0.5)
    for progress, share in ((0.0, 0.0), (0.1, 0.2), (0.5, 1.0), (1.0, 1.0), (None, 1.0)):
        for term, value in scaled(student, teacher, target, progress).items():
            torch.testing.assert_close(value, 3 * share * plain[term])


@every_loss
def test_losses_can_be_copied_and_pickled(name: str) -> None:
    student, teacher, target = batch()
    loss = LOSSES[name]()
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin(student, teacher, target, 0.3) == loss(student, teacher, target, 0.3)


def test_torch_compile_gives_the_same_numbers() -> None:
    student, teacher, target = batch(dtype=torch.float32)
    loss = LOSSES["aekt topk"]()
    compiled = torch.compile(loss, backend="aot_eager")(student, teacher, target, 0.3)
    eager = loss(student, teacher, target, 0.3)
    for term in eager:
        torch.testing.assert_close(compiled[term], eager[term])
    torch.testing.assert_close(gradient_of(compiled, student), gradient_of(eager, student))


@pytest.mark.parametrize("name", ["kd", "dkd topk", "gdkd both", "gdkd3", "aekt"])
def test_a_loss_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    student, teacher, target = batch(dtype=torch.float32)
    loss = LOSSES[name]()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)(student, teacher, target, 0.3)
    for term, value in loss(student, teacher, target, 0.3).items():
        torch.testing.assert_close(compiled[term], value)


def test_numbers_are_not_checked_where_the_user_says_so_and_shapes_are() -> None:
    student, teacher, target = batch()
    with pytest.raises(ValueError, match="target has class 9"):
        KDLoss()(student, teacher, target.fill_(9))
    with pytest.raises((RuntimeError, IndexError), match="index"):  # torch's own check of an index on the CPU
        KDLoss(validate=False)(student, teacher, target)
    with pytest.raises(ValueError, match=r"target must be \(7,\), one class index per row, not \(5,\)"):
        KDLoss(validate=False)(student, teacher, target[:5])


@every_loss
def test_without_reduction_every_row_has_its_terms_whose_mean_is_the_loss(name: str) -> None:
    student, teacher, target = batch()
    weights = torch.rand(len(student))
    for options in ({}, {"row_weights": weights}):
        whole = LOSSES[name](weight=2.0)(student, teacher, target, 0.2, **options)
        rows = LOSSES[name](weight=2.0, reduction="none")(student, teacher, target, 0.2, **options)
        assert all(row.shape == (len(student),) for row in rows.values())
        torch.testing.assert_close({term: row.mean() for term, row in rows.items()}, whole)
        torch.testing.assert_close(
            gradient_of({t: row.mean() for t, row in rows.items()}, student), gradient_of(whole, student)
        )


@every_loss
@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_a_teacher_and_a_target_may_come_from_inference_mode(name: str, chunk_rows: int | None) -> None:
    student, teacher, target = batch()
    loss = LOSSES[name](chunk_rows=chunk_rows)
    expected = gradient_of(loss(student, teacher, target), student)
    with torch.inference_mode():
        inferred = teacher.clone(), target.clone()
    assert torch.equal(gradient_of(loss(student, *inferred), student), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
def test_a_target_of_any_integer_type_is_checked_and_used(dtype: torch.dtype) -> None:
    student, teacher, target = batch()
    terms, expected = (DKDLoss()(student, teacher, t) for t in (target.to(dtype), target))
    assert terms.keys() == expected.keys() and all(torch.equal(terms[name], expected[name]) for name in terms)
    with pytest.raises(ValueError, match="target has class 7, but the logits have classes 0 to 6"):
        DKDLoss()(student, teacher, (target + 1).to(dtype))


@every_loss
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_of_rows_give_the_same_values_and_gradients(name: str, chunk_rows: int, reduction: str) -> None:
    student, teacher, target = batch()
    whole = LOSSES[name](reduction=reduction)(student, teacher, target, 0.2)
    chunked = LOSSES[name](reduction=reduction, chunk_rows=chunk_rows)(student, teacher, target, 0.2)
    torch.testing.assert_close(chunked, whole)
    for term in whole:  # each stream goes back by itself
        upstream = torch.rand_like(whole[term])
        gradients = (torch.autograd.grad(t[term], student, upstream, retain_graph=True)[0] for t in (chunked, whole))
        torch.testing.assert_close(*gradients)
    torch.testing.assert_close(
        *(torch.autograd.grad([v.sum() for v in t.values()], student)[0] for t in (chunked, whole))
    )


@every_loss
def test_gradcheck_in_chunks_of_rows(name: str) -> None:
    student, teacher, target = batch(rows=5, classes=6)
    loss = LOSSES[name](temperature=2.0, chunk_rows=2)
    if name.startswith("aekt"):
        loss.explicit = lambda parts: parts.mass
    assert gradcheck(lambda logits: tuple(loss(logits, teacher, target, 0.2).values()), (student,))


@pytest.mark.parametrize("make", [KDLoss, DKDLoss])
def test_by_the_teachers_top_class_no_label_is_needed(make: type[nn.Module]) -> None:
    student, teacher, target = batch()
    loss = make(partition="teacher_top1")
    terms = loss(student, teacher, None)
    assert terms == loss(student, teacher, target) == make()(student, teacher, teacher.argmax(1))
    if make is KDLoss:  # the whole divergence, whatever the class
        torch.testing.assert_close(sum(terms.values()), sum(KDLoss()(student, teacher, target).values()))


def test_a_partition_that_there_is_not_is_named() -> None:
    for make in (KDLoss, DKDLoss, AEKTLoss):
        with pytest.raises(ValueError, match="partition must be one of target, teacher_top1, not 'student_top1'"):
            make(partition="student_top1")


def test_repr_shows_the_parameters() -> None:
    assert repr(DKDLoss(beta=2)) == "DKDLoss(alpha=1.0, beta=2.0, temperature=4.0, partition='target')"
    text = repr(ForegroundBackground(GDKD3Loss(k=3, warmup=0.1), KDLoss(topk=TopKSchedule())))
    assert "GDKD3Loss(w0=1.0, w1=1.0, w2=1.0, k=3, temperature=4.0, warmup=0.1)" in text
    assert "topk=TopKSchedule(start=0.05" in text


@pytest.mark.parametrize("name", ["kd", "dkd", "aekt"])
def test_two_classes_have_no_non_target_term_and_the_log_says_so_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    base.warn_no_nontarget_term.cache_clear()
    student, teacher, target = batch(classes=2)
    loss = LOSSES[name]()
    with caplog.at_level(logging.WARNING, "kd_core"):
        terms = [loss(student, teacher, target) for _ in range(3)]
    target_term, other = terms[0].values()
    assert target_term > 0
    assert other == 0
    assert [record.message for record in caplog.records] == [
        f"{type(loss).__name__}: with two classes there is one non-target class, so the non-target term is 0"
    ]


@every_loss
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_logits": torch.zeros(7, 7, 2)}, r"student_logits must be \(N, C\), not \(7, 7, 2\)"),
        ({"student_logits": torch.zeros(7, 7).long()}, "student_logits must be of a floating type, not torch.int64"),
        ({"teacher_logits": torch.zeros(7, 8)}, r"teacher_logits are \(7, 8\) but student_logits are \(7, 7\)"),
        ({"target": torch.zeros(5, dtype=torch.long)}, r"target must be \(7,\), one class index per row, not \(5,\)"),
        ({"target": torch.zeros(7, 7)}, r"target must be \(7,\), one class index per row, not \(7, 7\)"),
        ({"target": torch.zeros(7)}, "target must hold class indices of an integer type, not torch.float32"),
        ({"target": torch.full((7,), 7)}, "target has class 7, but the logits have classes 0 to 6"),
        ({"target": torch.full((7,), -1)}, "target has class -1, but the logits have classes 0 to 6"),
        ({"row_weights": torch.ones(4)}, r"row_weights must be \(7,\), one per row, not \(4,\)"),
        ({"progress": -0.1}, r"progress is iteration / max_iter, in \[0, 1\], not -0.1"),
    ],
)
def test_bad_input_is_named(name: str, change: dict, message: str) -> None:
    student, teacher, target = batch()
    inputs = {"student_logits": student, "teacher_logits": teacher, "target": target, "progress": None} | change
    with pytest.raises(ValueError, match=message):
        LOSSES[name]()(**inputs)


@every_loss
def test_one_class_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="1"):
        LOSSES[name]()(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(("make", "needs"), [(KDLoss, True), (DKDLoss, True), (GDKDLoss, False), (GDKD3Loss, False)])
def test_only_losses_that_read_the_label_need_one(make: type[nn.Module], needs: bool) -> None:
    student, teacher, target = batch()
    loss = make()
    assert loss.needs_target is needs
    if needs:
        with pytest.raises(ValueError, match=r"target must be an .* tensor of class indices, not None"):
            loss(student, teacher, None)
    else:
        assert loss(student, teacher, None) == loss(student, teacher, target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, not 0.0"),
        ({"temperature": -1}, "temperature must be above 0, not -1"),
        ({"temperature": float("nan")}, "temperature must be finite, not nan"),
        ({"temperature": "warm"}, "temperature must be a number, not 'warm'"),
        ({"weight": None}, "weight must be a number, not None"),
        ({"reduction": "sum"}, "reduction must be one of mean, none, not 'sum'"),
        ({"chunk_rows": 0}, "chunk_rows must be a whole number >= 1, not 0"),
        ({"warmup": 1000}, r"warmup is a share of training progress, in \[0, 1\], not 1000"),
    ],
)
@pytest.mark.parametrize("make", [KDLoss, DKDLoss, GDKDLoss, GDKD3Loss, AEKTLoss])
def test_bad_options_are_named(make: type[nn.Module], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
