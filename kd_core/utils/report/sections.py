"""The sections that reports of detectors and of classifiers share: results, seeds, curves, how the runs were made."""

import math
import re
from collections.abc import Callable, Sequence

from kd_core.utils.report.curves import charts
from kd_core.utils.report.page import Facts, Gallery, Section
from kd_core.utils.report.runs import Run, complete_groups, lookup
from kd_core.utils.report.tables import Metric, paired_table, results_table, runs_table

LOG_BYTES = 200_000  # of a log.txt, from its beginning, where the versions are
VERSIONS_IN_LOG = {"python": r"^Python +(\S+)", "torch": r"^PyTorch +(\S+)", "detectron2": r"^detectron2 +(\S+)"}
COMMAND_IN_LOG = r"Command line arguments: (.+)"


def state(metric: str) -> Callable[[Run], str]:
    """How far a run is, judged by whether `metric` was evaluated at its end."""

    def of(run: Run) -> str:
        if run.evaluated:
            return f"is an evaluation of {run.evaluated}"
        if run.is_finished(metric):
            return "is finished"
        if run.iteration < 0:
            return "has logged nothing"
        if run.iteration + 1 >= run.max_iter > 0:
            return "was not evaluated at its end"
        done = min(run.iteration + 1, run.max_iter or math.inf)
        return f"is unfinished: {done} of {run.max_iter or '?'} iterations"

    return of


def common_notes(runs: Sequence[Run], metric: str, label: str) -> list[str]:
    """What a reader must know before the figures."""
    notes, of = [], state(metric)
    for run in runs:
        name = f"{run.title}, {run.name}"
        values = run.series(metric)[1]
        if run.evaluated or not run.is_finished(metric):
            notes.append(f"{name} {of(run)}." + ("" if values else f" It has no {label} yet."))
        if values and math.isnan(values[-1]):
            notes.append(f"{name}: {label} is NaN. Not one detection, or no ground truth, in the last evaluation.")
        losses = [key for key in run.scalars() if "loss" in key]
        lost = [key for key in losses if not all(map(math.isfinite, run.series(key)[1]))]
        if lost:
            notes.append(f"{name}: not finite at some iteration: {', '.join(lost)}. Its curves have gaps there.")
    roles = {run.role for run in runs}
    if "teacher" not in roles:
        notes.append("No teacher is among the runs: there is no gap to compare with.")
    return notes


def results_section(groups: dict[str, list[Run]], metrics: Sequence[Metric], text: Sequence[str] = ()) -> Section:
    """Teacher, plain training and students side by side."""
    several = ["Several runs: mean ± standard deviation, unfinished ones left out where others are finished."]
    text = [*text, *(several if any(len(group) > 1 for group in groups.values()) else [])]
    return Section("Results", text, [results_table(groups, metrics)])


def seeds_section(
    runs: Sequence[Run], metrics: Sequence[Metric], metric: str, baseline: str | None = None
) -> Section:
    """Every run, and the paired differences to `baseline` (default: plain training)."""
    groups = complete_groups(runs, metric)
    section = Section("Runs", [], [runs_table(runs, metrics, state(metric))])
    plain = next((title for title, group in groups.items() if group[0].role == "plain"), None)
    if baseline or plain:
        paired = paired_table(groups, baseline or plain, metrics)
        section.blocks += [paired] if paired.rows else []
    return section


def curves_section(groups: dict[str, list[Run]], families: dict[str, str]) -> Section:
    """Charts of every key that a family's pattern matches whole; `families`: title → pattern."""
    keys = list(dict.fromkeys(key for group in groups.values() for run in group for key in run.scalars()))
    blocks = []
    for title, pattern in families.items():
        figures = charts(groups, [key for key in keys if re.fullmatch(pattern, key)])
        blocks += [Gallery(figures, title)] if figures else []
    several = any(len(group) > 1 for group in groups.values())
    text = ["Lines are means over seeds; the bands are ± one standard deviation."] if several else []
    return Section("Curves", text if blocks else ["Nothing was logged twice, so there is no curve."], blocks)


def origin_section(runs: Sequence[Run]) -> Section:
    """Command, versions, seed and commit of every run."""
    return Section("How they were made", [], [Facts(f"{run.title}: {run.name}", origin(run)) for run in runs])


def origin(run: Run) -> dict[str, str]:
    """From run.json; for an older run from what its log.txt says."""
    info, log = run.info, head_of_log(run)
    command = info.get("command") or first_match(COMMAND_IN_LOG, log) or "not recorded"
    versions = info.get("versions") or {
        name: found for name, pattern in VERSIONS_IN_LOG.items() if (found := first_match(pattern, log))
    }
    commit = info.get("commit", "not recorded") + (", with changes" if info.get("modified") else "")
    entries = {"command": command}
    for again in info.get("resumed", []):
        entries[f"resumed at iteration {again['iteration']}"] = again["command"]
    entries |= {
        "folder": str(run.folder),
        "seed": str(run.seed),
        "commit": commit,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or "not recorded",
    }
    teacher = lookup(run.config, "KD", "TEACHER", "WEIGHTS")
    if run.role == "student" and teacher:
        entries["teacher"] = str(teacher)
    entries |= {key: str(info[key]) for key in ("machine", "device", "world_size", "started") if key in info}
    return entries


def head_of_log(run: Run) -> str:
    path = run.folder / "log.txt"
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return file.read(LOG_BYTES).decode(errors="replace")


def first_match(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else ""
