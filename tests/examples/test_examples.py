"""The recipes of examples/ run as they are, and what they print shows that the student learns."""

import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from helpers import forked

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
RECIPES = sorted(path for path in EXAMPLES.glob("*.py") if path.name != "digits.py")


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, recwarn: pytest.WarningsRecorder):
    """Runs a recipe in this process, which has imported torch already. What it prints."""

    def run_recipe(name: str) -> str:
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    yield run_recipe
    sys.modules.pop("digits", None)


def numbers(text: str) -> list[float]:
    return [float(word) for word in re.findall(r"\d+\.\d+", text)]


def test_plain_torch_learns(printed) -> None:
    before, teacher, after = numbers(printed("plain_torch.py"))
    assert before < 0.3 and teacher > 0.95 and after > 0.9


def test_accelerate_trains_in_two_processes_and_resumes_to_the_same_weights() -> None:
    done, other = forked.run_ranks(2, [EXAMPLES / "accelerate_two_processes.py"])
    assert done.returncode == other.returncode == 0, done.stderr + other.stderr
    assert "2 processes" in done.stdout and "the same weights: True" in done.stdout, done.stdout
    assert min(numbers(done.stdout)) > 0.85


def test_lightning_clips_by_itself_and_resumes_to_the_same_weights(printed) -> None:
    output = printed("lightning_manual.py")
    assert "the same weights: True" in output
    assert min(numbers(output)) > 0.85


def test_the_hf_trainer_clips_and_accumulates_by_itself(printed) -> None:
    student, before = numbers(printed("hf_trainer.py").splitlines()[-1])
    assert before < 0.3 and student > 0.8


def test_a_language_model_learns_the_chain_and_its_padding_counts_nowhere(printed) -> None:
    before, teacher, after = numbers(printed("language_model.py"))
    assert before > 30 and teacher < 4 and 2.9 < after < 4


def test_the_notebook_runs_from_top_to_bottom() -> None:
    notebook = nbformat.read(EXAMPLES / "distill.ipynb", as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": EXAMPLES}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    plain, distilled, teacher = numbers("".join(output.get("text", "") for output in outputs))[-3:]
    assert plain > 0.7 and distilled > 0.85 and teacher > 0.95


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_says_the_command_that_runs_it(path: Path) -> None:
    text = path.read_text()
    assert re.search(rf"^    (python|torchrun --nproc-per-node 2) examples/{path.name}$", text, re.MULTILINE)
