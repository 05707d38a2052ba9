"""Python commands in processes that are forked from one that has imported torch, detectron2, timm and our packages.

A process that imports them itself spends more time on that than a tiny training takes. The fork server is
multiprocessing's: a test's own process cannot be forked, for it may have run a backward pass, after which a forked
child cannot.
"""

import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from . import ROOT
from .processes import MARK, end

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["kd_det.engine.train", "kd_cls.train", "torch.utils.tensorboard"])


@contextmanager
def started(target: Callable[..., None], *args: Any) -> Iterator[BaseProcess]:
    """A process that calls `target(*args)`, in a session of its own; at the end of the block it and everything that it
    has started are killed, as by `processes.started`.
    """
    mark = uuid.uuid4().hex
    process = SERVER.Process(target=in_a_session, args=(mark, target, *args))
    process.start()
    try:
        yield process
    finally:
        process.kill()  # it may not have a session yet
        end(process.pid, mark)
        process.join()


def in_a_session(mark: str, target: Callable[..., None], *args: Any) -> None:
    os.setsid()
    os.environ[MARK] = mark
    gc.freeze()  # what the server has imported need not be looked through again
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # the fork server's children would start servers of their own
    target(*args)


def started_command(
    words: Sequence[object], output: Path, env: Mapping[str, str] = os.environ, cwd: Path = ROOT
) -> contextlib.AbstractContextManager[BaseProcess]:
    """`python WORDS…`; what it prints is in `output`.out and `output`.err."""
    return started(be_python, [str(word) for word in words], str(output), dict(env), str(cwd))


def be_python(words: list[str], output: str, env: dict[str, str], cwd: str) -> None:
    """What `python WORDS…` does. The Python commands that it starts are forks too."""
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output + suffix, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout.reconfigure(line_buffering=True)  # tests read it meanwhile
    os.chdir(cwd)
    subprocess.Popen = Forking
    run_python(words, env)


def run_python(words: list[str], env: Mapping[str, str]) -> None:
    """Run a script, or -m and a module, as the main program."""
    os.environ.update(env)  # what is read at import, such as DETECTRON2_DATASETS, has been read
    sys.orig_argv = [sys.executable, *words]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


class Forking(subprocess.Popen):
    """A process as ever, but what runs Python is a fork that goes on as that command in place of starting anew."""

    def __init__(self, args: Sequence[object], *rest: Any, **options: Any) -> None:
        words = [] if isinstance(args, str) else [str(word) for word in args]
        if words[:1] == [sys.executable]:
            words = [word for word in words[1:] if word != "-u"]
            if words[0] == "-m" or words[0].endswith(".py"):
                options["preexec_fn"] = partial(go_on_as, words, options.get("env") or {})
        # A signal between the fork and go_on_as would meet the handlers of this process.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS if "preexec_fn" in options else ())
        try:
            super().__init__(args, *rest, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def go_on_as(words: list[str], env: Mapping[str, str]) -> None:
    """Called between fork and exec, which does not come: input, output, folder and session are those of the command."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number != null:
            with contextlib.suppress(OSError):  # the listing's own
                os.dup2(null, number)  # closed for others: `Popen` waits for that
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    gc.enable()
    code, began = 1, False
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # one that came since the fork strikes here
        began = True
        run_python(words, env)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        if began:  # a real command that is interrupted before Python runs it has no traceback, either
            traceback.print_exc()
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if code < 0:  # as Python itself ends: a caller sees that it was interrupted, and has not failed
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code)


def run(
    words: Sequence[object], env: Mapping[str, str] = os.environ, cwd: Path = ROOT, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """`python WORDS…` to its end."""
    (done,) = run_beside_each_other(words, [env], cwd, timeout)
    return done


def run_ranks(count: int, words: Sequence[object], timeout: float = 300) -> list[subprocess.CompletedProcess[str]]:
    """`torchrun --standalone --nproc-per-node COUNT WORDS…`, without the launcher, to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    group = address | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "none"}
    group |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environments = [os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return run_beside_each_other(words, environments, ROOT, timeout)


def run_beside_each_other(
    words: Sequence[object], environments: Sequence[Mapping[str, str]], cwd: Path, timeout: float
) -> list[subprocess.CompletedProcess[str]]:
    """`python WORDS…` in every environment at the same time; the first that fails ends all."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        outputs = [Path(folder, str(number)) for number in range(len(environments))]
        processes = [
            stack.enter_context(started_command(words, output, env, cwd))
            for output, env in zip(outputs, environments, strict=True)
        ]
        running = list(processes)
        while running and not any(process.exitcode for process in processes):
            if not wait([process.sentinel for process in running], timeout):
                raise TimeoutError(f"{words} ran longer than {timeout} s")
            running = [process for process in running if process.exitcode is None]
        stack.close()
        texts = [[output.with_suffix(kind).read_text() for kind in (".out", ".err")] for output in outputs]
        return [
            subprocess.CompletedProcess(words, process.exitcode, *text)
            for process, text in zip(processes, texts, strict=True)
        ]
