"""LOSS.COMPILE: the same numbers, and nothing is compiled anew when progress moves."""

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from kd_core.losses import DistillationLoss, DKDLoss, GDKDLoss, KDLoss, add_loss_config, build_loss
from kd_core.topk import TopKSchedule


class Compilations:
    """A backend that runs what dynamo has captured as it is, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


def compiled(loss: DistillationLoss, backend: Any) -> DistillationLoss:
    torch._dynamo.reset()
    loss = copy.deepcopy(loss)
    loss.compile(backend=backend)
    return loss


def values_and_gradient(loss: DistillationLoss, progress: float, rows: int) -> Tensor:
    """Every term of a batch, backpropagated one by one as streams are, and the gradient of their sum."""
    generator = torch.Generator().manual_seed(rows)
    student, teacher = (3 * torch.randn(rows, 41, generator=generator) for _ in range(2))
    target = torch.randint(41, (rows,), generator=generator)
    terms = list(loss(student.requires_grad_(), teacher, target, progress).values())
    for number, term in enumerate(terms, 1):
        term.backward(retain_graph=number < len(terms))
    return torch.cat([torch.stack(terms).detach(), student.grad.flatten()])


def is_compiled(loss: DistillationLoss) -> bool:
    return loss.compiled_terms is not None and loss.compiled_terms.compiled is not loss.compiled_terms.function


@pytest.mark.parametrize(
    ("loss", "compilations"),
    [
        (DKDLoss(warmup=0.5), 1),
        (GDKDLoss(auto_k=True, kl="both"), 1),
        (KDLoss(standardize=True, topk=TopKSchedule(), warmup=0.3), 2),  # with a mask of any K, and without
    ],
)
def test_twenty_values_of_progress_compile_once_and_a_masked_loss_twice(
    loss: DistillationLoss, compilations: int
) -> None:
    backend = Compilations()
    fast = compiled(loss, backend)
    for step in range(20):
        expected, found = (values_and_gradient(each, step / 20, 8) for each in (loss, fast))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert is_compiled(fast) and backend.count == compilations


def test_other_numbers_of_rows_cost_one_more_compilation_and_no_rows_another() -> None:
    backend = Compilations()
    loss = DKDLoss()
    fast = compiled(loss, backend)
    for rows in (8, 7, 6, 0, 5):
        torch.testing.assert_close(values_and_gradient(fast, 0.5, rows), values_and_gradient(loss, 0.5, rows))
    assert is_compiled(fast) and backend.count <= 3


def test_terms_that_autograd_has_compiled_too_go_back_one_by_one() -> None:
    loss = DKDLoss()
    fast = compiled(loss, "aot_eager")  # as inductor, without a C++ compiler
    torch.testing.assert_close(values_and_gradient(fast, 0.5, 8), values_and_gradient(loss, 0.5, 8))
    assert is_compiled(fast)


def test_without_a_compiler_the_plain_loss_goes_on_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*graph: Any) -> None:
        raise OSError("no C++ compiler")

    loss = DKDLoss()
    fast = compiled(loss, broken)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(values_and_gradient(fast, 0.5, 8), values_and_gradient(loss, 0.5, 8))
    assert not is_compiled(fast)
    assert [record.getMessage() for record in caplog.records if "DKDLoss failed" in record.getMessage()]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_of_a_compiled_loss_computes_by_its_own_numbers(copied: Callable[[DKDLoss], DKDLoss]) -> None:
    fast = copied(compiled(DKDLoss(beta=8.0), "eager"))
    fast.beta = 2.0
    expected = values_and_gradient(DKDLoss(beta=2.0), 0.5, 8)
    torch.testing.assert_close(values_and_gradient(fast, 0.5, 8), expected)
    assert is_compiled(fast)


def test_bad_input_is_named_as_ever() -> None:
    with pytest.raises(ValueError, match=r"target has class 41"):
        compiled(DKDLoss(), "eager")(torch.zeros(2, 41), torch.zeros(2, 41), torch.tensor([0, 41]))


@pytest.mark.parametrize("name", ["kd", "dkd", "gdkd", "gdkd3", "gdkds", "aekt"])
def test_the_key_reaches_every_loss_and_every_part_of_one(name: str) -> None:
    node = CfgNode()
    add_loss_config(node)
    node.NAME = name
    assert not any(is_compiled(part) for part in build_loss(node).modules() if isinstance(part, DistillationLoss))
    node.COMPILE = True
    parts = [part for part in build_loss(node).modules() if isinstance(part, DistillationLoss)]
    assert parts and all(map(is_compiled, parts))
