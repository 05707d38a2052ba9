#!/usr/bin/env python
"""A table of methods, each tuned by the same number of tries: tools/search.py TABLE.

    tools/search.py configs/Search/detection_digits.yaml --jobs 2          # hours on two CPU cores
    tools/search.py configs/Search/detection_digits.yaml --report          # draw what is finished; trains nothing

1. Search. Each method of TABLE is trained `tries` times on the search seed: first as its config says, then with values
   drawn at random, without repetition, from its grid. Judged by the metric on the search's images.
2. Test. The best try of each method is trained on fresh seeds, untouched, and judged once on images that no search saw.

"{seed}" in a value of TABLE is the training's seed: for a folder that only trainings of one seed share.

A table with one try has no search: every method is trained as its config says, as for the papers' own tables.

Interrupt it at any time: the same command skips what is finished and resumes the rest. So does --minutes, which ends
it in time. Everything is in OUTPUT (by default output/search/TABLE): a folder for each training, results.json, and
report.md, which is drawn from the former. A try that diverges counts as a try without a result. Every other failure,
and a test that diverges, makes the exit status 1, and is tried again by the same command. TABLE may grow: new methods
and seeds are trained beside what is there. With a results.json from elsewhere in OUTPUT, only what is missing is
trained, and a teacher where that needs one. Methods without a teacher are trained first, beside it.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from demo import ROOT, Trainings, interrupt, run_command, wait_for

from kd_core.utils.arguments import count, refuse_not_positive
from kd_core.utils.errors import DIVERGED, UserError
from kd_core.utils.files import write_text
from kd_core.utils.report.runs import Run, read_lines
from kd_core.utils.report.tables import Table, markdown, mean_std
from kd_core.utils.run_info import machine, source, versions
from kd_core.utils.search_table import PACKAGES, Results, Training, config_digest, design, read_table, words_of


class Search:
    """The trainings of a table and their results."""

    def __init__(self, table: dict[str, Any], args: argparse.Namespace, output: Path) -> None:
        self.table, self.args, self.output = table, args, output
        self.command, self.metric, self.weights = PACKAGES[table["package"]]
        self.teacher = output / "teacher"
        identity = {"table": args.table.name, "command line options": args.options}
        self.results = Results(output / "results.json", identity)
        self.results.read()
        self.tries = {
            name: design(method.get("grid", {}), table["tries"], table["design_seed"], name)
            for name, method in table["methods"].items()
        }
        self.check_results(files_too=not args.report)

    def check_results(self, files_too: bool) -> None:
        """What is finished is of this table.

        Raises:
            UserError: a training is not.
        """
        self.results.check("teacher", self.table["teacher"]["config"], self.teacher_words, files_too)
        for training in (*self.searches(), *self.tests()):
            self.results.check(training.key, training.config, self.words(training), files_too)

    def training(self, name: str, phase: str, number: int, seed: int) -> Training:
        method = self.table["methods"][name]
        words = words_of(self.tries[name][number]) + words_of(self.table[phase]["options"])
        return Training(name, phase, number, seed, method["config"], words)

    def searches(self) -> list[Training]:
        tries, seed = self.table["tries"], self.table["search"]["seed"]
        return [self.training(name, "search", i, seed) for i in range(tries) for name in self.names if tries > 1]

    def tests(self) -> list[Training]:
        """The best try of each method on every fresh seed."""
        return [
            self.training(name, "test", best, seed)
            for seed in self.table["test"]["seeds"]
            for name in self.names
            if (best := self.best(name)) is not None
        ]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(self.args.methods or self.table["methods"]))

    @property
    def teacher_words(self) -> tuple[str, ...]:
        """The teacher's overrides."""
        return (*words_of(self.table["teacher"]["options"]), *self.args.options)

    def words(self, training: Training) -> tuple[str, ...]:
        """A student's overrides, but for the teacher's file."""
        words = (*words_of(self.table["options"]), *training.words, *self.args.options)
        return tuple(word.replace("{seed}", str(training.seed)) for word in words)

    def is_taught(self, method: str) -> bool:
        return self.table["methods"][method].get("teacher", True)

    def value(self, training: Training) -> float | None:
        """The metric of a training; None where it failed or is not finished."""
        return self.results.entries.get(training.key, {}).get("value")

    def best(self, name: str) -> int | None:
        """The try with the highest metric in the search, the first of equals; None where none has one."""
        if self.table["tries"] == 1:
            return 0
        seed = self.table["search"]["seed"]
        values = [self.value(self.training(name, "search", number, seed)) for number in range(self.table["tries"])]
        found = [number for number, value in enumerate(values) if value is not None]
        return max(found, key=lambda number: (values[number], -number)) if found else None

    def run(self, trainings: Trainings) -> None:
        """Train whatever is missing: the teacher, every try, and the best of each method on the fresh seeds.

        Raises:
            UserError: a training failed, but for tries that diverged.
        """
        for phase in (self.searches, self.tests):
            missing = [training for training in phase() if self.is_missing(training)]
            taught = [training for training in missing if self.is_taught(training.method)]
            untaught = [training for training in missing if not self.is_taught(training.method)]
            # The teacher takes the first job, those that need none the others.
            teacher = trainings.pool.submit(self.train_teacher, trainings) if taught and self.lacks_teacher() else None
            futures = [trainings.pool.submit(self.train, trainings, training) for training in untaught]
            error = None
            try:
                if teacher:
                    wait_for(teacher)
                futures += [trainings.pool.submit(self.train, trainings, training) for training in taught]
            except UserError as failure:  # the plain ones, which it does not concern, go on
                error = failure
            for future in futures:
                wait_for(future)
            if error:
                raise error
            if failed := [training.key for training in phase() if self.is_missing(training)]:
                raise UserError(f"{', '.join(failed)} failed; run the same command again to try again")

    def is_missing(self, training: Training) -> bool:
        """A try that diverged is a result. Every other failure is missing: it may have lacked memory or disk."""
        entry = self.results.entries.get(training.key)
        if entry is None or entry.get("value") is not None:
            return entry is None
        return training.phase == "test" or entry.get("exit") != DIVERGED

    @property
    def teacher_identity(self) -> str:
        """What its folder's file `finished` says."""
        return json.dumps([self.table["teacher"]["config"], *self.teacher_words])

    def lacks_teacher(self) -> bool:
        """Whether this folder has no teacher that is finished.

        Raises:
            UserError: it has another.
        """
        finished = self.teacher / "finished"
        if finished.is_file() and finished.read_text(encoding="utf-8") != self.teacher_identity:
            raise UserError(f"{self.teacher} is of another table: remove it, or choose another --output")
        return not finished.is_file()

    def train_teacher(self, trainings: Trainings) -> None:
        """
        Raises:
            UserError: the training failed.
        """
        config, words = self.table["teacher"]["config"], self.teacher_words
        origin = self.origin(0, config, words)
        try:
            trainings.run(self.command_of(config, self.teacher, 0, words))
        except subprocess.CalledProcessError as error:
            why = "diverged" if error.returncode == DIVERGED else f"failed (exit {error.returncode})"
            raise UserError(f"the teacher {why}; its message is above. The same command tries again") from error
        found = evaluations(self.teacher / "metrics.json", self.metric)
        before = self.results.entries.get("teacher", {}).get("value", found["value"])
        if before != found["value"]:  # a results.json from elsewhere
            print(f"[search] the students before had a teacher of {before:.2f}, this one has {found['value']:.2f}")
        self.results.add({"training": "teacher", **found} | origin)
        write_text(self.teacher / "finished", self.teacher_identity)

    def command_of(self, config: str, folder: Path, seed: int, words: Sequence[str]) -> list[str]:
        options = ("OUTPUT_DIR", str(folder), "SEED", str(seed), *words)
        return [sys.executable, *self.command, "--config-file", config, "--resume", *options]

    def train(self, trainings: Trainings, training: Training) -> None:
        """Train, and add its entry."""
        print(f"[search] {training.key}: {' '.join(training.words)}", flush=True)
        words = self.words(training)
        teacher = ("KD.TEACHER.WEIGHTS", str(self.teacher / self.weights)) if self.is_taught(training.method) else ()
        folder = self.output / training.key
        entry: dict[str, Any] = {"training": training.key, "method": training.method, "phase": training.phase}
        entry |= {"try": training.number, **self.origin(training.seed, training.config, words)}
        try:
            trainings.run(self.command_of(training.config, folder, training.seed, (*words, *teacher)))
            entry |= evaluations(folder / "metrics.json", self.metric)
        except subprocess.CalledProcessError as error:
            if error.returncode < 0:  # a signal's: it was killed, and has not failed
                print(f"[search] {training.key} was killed (signal {-error.returncode})", flush=True)
                raise
            entry |= {"value": None, "exit": error.returncode}
            print(f"[search] {training.key} failed (exit {error.returncode}); its message is above", flush=True)
        self.results.add(entry)

    def origin(self, seed: int, config: str, words: Sequence[str]) -> dict[str, Any]:
        """What a training's value depends on, and where it is found, when it starts."""
        what = {"metric": self.metric, "seed": seed, "config": config, "overrides": list(words)}
        what["config_digest"] = config_digest(config)
        where = {"cores": os.cpu_count(), "threads": self.args.threads, "jobs": self.args.jobs}
        return what | source() | {"versions": versions(), "machine": machine()} | where

    def report(self) -> str:
        """The table, drawn from results.json: mean ± sample standard deviation over the fresh seeds."""
        rows = []
        if (value := self.results.entries.get("teacher", {}).get("value")) is not None:
            rows.append(["teacher", f"{value:.2f}", 1, self.table["teacher"].get("published", ""), "", "", "", ""])
        for name in self.names:
            searched = [t for t in self.searches() if t.method == name]
            done = [t for t in searched if t.key in self.results.entries]
            tests = [t for t in self.tests() if t.method == name]
            failed = sum(self.value(t) is None for t in (*done, *tests) if t.key in self.results.entries)
            values = [value for t in tests if (value := self.value(t)) is not None]
            best, validation, chosen = self.best(name), "", ""
            if best is not None and searched:
                validation = f"{self.value(searched[best]):.2f}"
                chosen = ", ".join(f"{key} {value}" for key, value in self.tries[name][best].items())
            published = self.table["methods"][name].get("published", "")
            rows.append([name, mean_std(values), len(values), published, validation, len(done), failed, chosen])
        headers = ["", f"test {self.metric}", "seeds", "published", "search", "tries", "failed", "chosen"]
        # Without a search, or published figures, their columns are empty: left out.
        shown = [column for column, cells in enumerate(zip(*rows, strict=True)) if column < 3 or any(cells)]
        cells = [(row[0], [[str(row[column])] for column in shown[1:]]) for row in rows]
        return markdown(Table([headers[column] for column in shown], cells))

    def tries_by(self, key: str) -> str:
        """The search's values by one key of the grids: the best try that has each value; the best of a row is bold.

        Raises:
            UserError: no grid has the key.
        """
        grids = [method.get("grid", {}) for method in self.table["methods"].values()]
        columns = sorted({value for grid in grids for value in grid.get(key, [])})
        if not columns:
            raise UserError(f"no grid of {self.args.table} has {key}")
        rows = []
        for name in self.names:
            found: dict[Any, list[float]] = {column: [] for column in columns}
            for training in (t for t in self.searches() if t.method == name):
                column, value = self.tries[name][training.number].get(key), self.value(training)
                if column in found and value is not None:
                    found[column].append(value)
            best = max(itertools.chain(*found.values()), default=None)
            words = {column: f"{max(values):.2f}" if values else "–" for column, values in found.items()}
            rows.append((name, [f"**{word}**" if best in found[column] else word for column, word in words.items()]))
        return markdown(Table([f"search {self.metric}", *(f"{key} {column}" for column in columns)], rows))

    def tested(self) -> list[Run]:
        """The finished tests, with the metric over the iterations where the entry has it."""
        runs = []
        for training in self.tests():
            entry = self.results.entries.get(training.key, {})
            if entry.get("value") is not None:
                lines = [{"iteration": i, self.metric: v} for i, v in entry.get("curve", [[0, entry["value"]]])]
                role = "student" if self.is_taught(training.method) else "plain"
                runs.append(Run(Path(training.key), {"SEED": training.seed}, lines, title=training.method, role=role))
        return runs


def evaluations(path: Path, metric: str) -> dict[str, Any]:
    """`value`, the last of a metric in metrics.json, and its `curve`: [iteration, value] of every evaluation.

    detectron2 says NaN where nothing is detected: 0.

    Raises:
        UserError: there is none.
    """
    iterations, values = Run(path.parent, {}, read_lines(path)).series(metric)
    if not values:
        raise UserError(f"{path} has no {metric}: the training was not evaluated")
    last = dict(zip(iterations, values, strict=True))  # an evaluation is repeated after a kill before its checkpoint
    curve = [[i, 0.0 if math.isnan(value) else value] for i, value in last.items()]
    return {"value": curve[-1][1], "curve": curve}


def of_results(path: Path) -> Search:
    """The search that a results.json is of, by the table's name, to draw what is in it; trains nothing.

    Raises:
        UserError: the table is not one of configs/Search.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    table = ROOT / "configs" / "Search" / found["table"]
    if not table.is_file():
        raise UserError(f"{path} is of {table.name}, which is not in configs/Search: move it there, or draw it with "
                        "tools/search.py TABLE --report")  # fmt: skip
    words = [str(table), "--report", *found.get("command line options", [])]
    search = Search(read_table(table), parse(words), path.parent)
    search.results.path = path
    search.results.entries = {entry["training"]: entry for entry in found["trainings"]}
    search.check_results(files_too=False)
    return search


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes of this tool, which would write its results.json too.

    Raises:
        UserError: another one holds it.
    """
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another tools/search.py works in {folder}: wait for it, or choose another --output, and "
                            "--jobs for trainings side by side") from None  # fmt: skip
        yield


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, metavar="TABLE", help="configs/Search/*.yaml")
    parser.add_argument("--methods", nargs="+", help="methods of the table to run (default: all)")
    parser.add_argument("--jobs", type=count, default=1, help="trainings at a time; the cores are divided among them")
    parser.add_argument("--output", type=Path, help="default: output/search/TABLE")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command resumes")
    parser.add_argument("--report", action="store_true", help="only draw report.md from results.json")
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="config keys to override, in every training")
    args = parser.parse_intermixed_args(arguments)
    refuse_not_positive(args, "minutes")
    args.threads = max((os.cpu_count() or 1) // args.jobs, 1)
    return args


def main(arguments: Sequence[str] | None = None) -> str:
    """The command; returns the report."""
    args = parse(arguments)
    table = read_table(args.table)
    if unknown := set(args.methods or ()) - set(table["methods"]):
        raise UserError(f"--methods {', '.join(sorted(unknown))}: {args.table} has {', '.join(table['methods'])}")
    output = (args.output or ROOT / "output" / "search" / args.table.stem).resolve()
    output.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext() if args.report else held(output):
        return run(Search(table, args, output))


def run(search: Search) -> str:
    """Train what is missing, unless only the report is asked for; returns the report."""
    args = search.args
    if args.minutes:
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 60 * args.minutes)
    try:
        if not args.report:
            with Trainings(args.jobs, {"OMP_NUM_THREADS": str(args.threads)}) as trainings:
                search.run(trainings)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        text = search.report()
        write_text(search.output / "report.md", f"{text}\n")
        print(f"{text}\n\nDrawn from {search.results.path}")
    return text


if __name__ == "__main__":
    run_command("search", main, "interrupted; run the same command again to resume")
