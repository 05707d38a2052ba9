"""torch.compile of detectors: the same numbers and names, else eager. Backends here need no C++ compiler."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from helpers.tiny_detector import make_batch
from kd_core.utils.compiling import CompiledOrPlain, compile_in_place
from kd_det.engine.train_step import build_step
from kd_det.modeling.teacher.acceleration import distilled_parts
from kd_det.solver import build_optimizer

DKD = ("KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0)
CASCADE = ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
SMALL = (  # few and narrow layers
    "MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", "resnet10t",
    "MODEL.TIMM.KWARGS", "[['channels', [8, 8, 16, 16]], ['stem_width', 8]]",
)  # fmt: skip


@pytest.fixture
def compiles(monkeypatch):
    """torch.compile by a backend that runs the captured graph as it is; the graphs that it was given."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield graphs
    torch.compiler.reset()


@pytest.fixture
def small_teacher(tiny_cfg, tmp_path):
    """Makes the teacher of `tiny_cfg` one of few layers."""
    tiny_cfg()
    text = tiny_cfg(*SMALL).dump()
    (tmp_path / "teacher.yaml").write_text(text)


def broken(*graph):
    raise OSError("no C++ compiler at /nonexistent")


def test_a_module_that_is_compiled_in_place_keeps_its_names_and_its_copies_are_plain(compiles):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    names, x = list(module.state_dict()), torch.randn(5, 3)
    expected = copy.deepcopy(module)(x)
    compile_in_place(module, "module")
    assert_close(module(x), expected)
    assert len(compiles) == 1 and list(module.state_dict()) == names
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        copied(x), copied.eval()(x)
        assert len(compiles) == 1 and list(copied.state_dict()) == names


def test_a_compiler_that_fails_is_named_once_and_done_without(caplog):
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    expected = module(x)
    compile_in_place(module, "student's backbone", backend=broken)
    assert torch.equal(module(x), expected) and torch.equal(module(x), expected)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "kd_core.utils.compiling"]
    assert message.startswith("torch.compile of the student's backbone failed (") and "no C++ compiler" in message
    assert message.endswith("; it falls back to eager") and "TORCHDYNAMO" not in message


def test_an_error_that_is_not_the_compilers_is_raised_as_it_is():
    forward = CompiledOrPlain(nn.Linear(3, 2), "layer", backend="eager")
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied"):
        forward(torch.randn(4, 5))


def test_a_compiled_student_takes_the_steps_of_a_plain_one_on_images_of_two_sizes(
    tiny_cfg, tiny_model, storage, compiles, small_teacher
):
    options = (*DKD, *CASCADE, *SMALL, "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.BASE_LR", 0.01)
    states = []
    for on in (False, True):
        cfg, model = tiny_cfg(*options, "KD.COMPILE", on), tiny_model(*options)
        trainer = build_step(cfg, model, [make_batch(), make_batch(size=96)], build_optimizer(cfg, model))
        for trainer.iter in range(2):
            torch.manual_seed(trainer.iter)
            trainer.run_step()
        assert all((part._compiled_call_impl is not None) == on for part in distilled_parts(model).values())
        states.append(model.state_dict())
        assert bool(compiles) == on
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)


def test_two_backward_passes_go_through_one_compiled_graph(tiny_cfg, tiny_model, storage, small_teacher):
    options = (*DKD, *SMALL, "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.BASE_LR", 0.01)
    torch.compiler.reset()
    weights = []
    for on in (False, True):
        cfg, model = tiny_cfg(*options), tiny_model(*options)
        if on:
            compile_in_place(model.roi_heads.box_head, "student's box head", backend="aot_eager")
        trainer = build_step(cfg, model, [make_batch()], build_optimizer(cfg, model))
        assert len(trainer.optimizer.stream_sets) == 2
        trainer.iter = 0
        torch.manual_seed(0)
        trainer.run_step()
        weights.append(model.roi_heads.box_head.fc1.weight)
    assert model.roi_heads.box_head._compiled_call_impl.is_compiled
    assert_close(weights[1], weights[0])


def test_a_teacher_that_is_compiled_in_half_precision_says_the_same(tiny_model, batch, compiles):
    half = (*DKD, "KD.TEACHER.DTYPE", "bfloat16")
    boxes = [[item["instances"].gt_boxes for item in batch]]
    plain, compiled = (tiny_model(*half, "KD.TEACHER.COMPILE", on).teacher for on in (False, True))
    (expected,), (ours,) = (teacher.view(batch, "BGR").box_logits(boxes) for teacher in (plain, compiled))
    assert len(compiles) == 2 and ours.dtype == torch.float32
    assert_close(ours, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_a_compiled_student_is_evaluated_and_its_copy_is_plain(tiny_cfg, tiny_model, batch, compiles):
    model = tiny_model(*DKD, *SMALL)
    expected = copy.deepcopy(model).eval()(batch)
    cfg = tiny_cfg(*DKD, *SMALL, "KD.COMPILE", True)
    build_step(cfg, model, [], build_optimizer(cfg, model))
    found = model.eval()(batch)
    assert compiles
    for ours, given in zip(found, expected, strict=True):
        assert_close(ours["instances"].scores, given["instances"].scores)
    assert all(part._compiled_call_impl is None for part in distilled_parts(copy.deepcopy(model)).values())
