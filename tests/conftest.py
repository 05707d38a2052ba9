"""What every test may use: one seed, and the way to the optional real data."""

import os
import signal
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers of pytest-xdist share the cores; read when torch is loaded
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # the processes that tests start compile our modules once
# What this machine has in the caches of weights, and its proxy, decide about no test.
os.environ["HF_HOME"] = os.environ["TORCH_HOME"] = str(Path(tempfile.gettempdir(), "kd_tests_without_weights"))
for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
    os.environ.pop(name, None)
for name in ("NO_PROXY", "no_proxy"):
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "localhost", "127.0.0.1"]))

import torch  # noqa: E402  (after the variables that it reads)

ROOT = Path(__file__).resolve().parent.parent
# The files that take longest, begun first: at the end no worker waits for another that has just begun one of them. The
# third writes the built-in digits, which the fourth does not wait for.
LONGEST = (
    "examples/test_examples.py", "kd_cls/checkpoint/test_resume.py", "kd_det/test_detection_configs.py",
    "tools/test_search.py", "test_wheel.py", "tools/test_train_net.py", "kd_det/engine/test_two_ranks.py",
    "tools/test_verify_gpu.py", "kd_det/checkpoint/test_kill_and_resume.py", "tools/test_distill.py",
    "kd_core/losses/test_losses_contract.py", "test_packages.py", "kd_core/test_imports.py",
)  # fmt: skip
collect_ignore = [] if "KD_UPSTREAM" in os.environ else ["upstream"]  # make test-upstream sets it

# nohup and background jobs start pytest with signals ignored, and exec hands an ignored signal down to every process
# that a test starts and then wants to interrupt. A handler that does nothing is not handed down.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the tests marked `gpu` are skipped where there is no GPU."""
    place = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip("there is no GPU"))


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data that some tests read: `KD_SHARED`, by default `../shared`. Tests that ask for it skip
    without it.
    """
    path = Path(os.environ.get("KD_SHARED", ROOT.parent / "shared")).resolve()
    if not path.is_dir():
        pytest.skip(f"no real data at {path}: set KD_SHARED to the folder that holds it")
    return path
