"""What `--resume` means, in detection as in classification: it continues the same run, or is refused."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from kd_core.utils.config import flatten
from kd_core.utils.errors import UserError
from kd_core.utils.files import write_text

RESUME_HINT = "that would mix two runs: resume with the config of the checkpoint, or train in another OUTPUT_DIR"


def check_same_run(
    saved: dict[str, Any],
    cfg: CfgNode | dict[str, Any],
    defaults: CfgNode | dict[str, Any] | None,
    ignored: Collection[str],
    source: str,
) -> None:
    """Refuse to resume with another method, teacher, loss, optimizer, schedule, data set or student.

    A key that `saved` lacks was added by a later version: it counts as its default. A key that is no longer in `cfg`
    is left out.

    Args:
        saved: the config of the run, nested dicts.
        cfg: the config to resume with.
        defaults: the package's default config. None: there is none, so a key that only one of the two has differs,
            with None on the other side.
        ignored: keys, and groups of keys, that may differ.
        source: where `saved` was found.

    Raises:
        UserError: names the first key that differs and both values.
    """
    before, now, default = (flatten(tree) for tree in (saved, plain(cfg), plain(defaults or {})))
    if defaults is None:
        now = dict.fromkeys(before) | now
    changed = [
        (key, before.get(key, default.get(key)), value)
        for key, value in now.items()
        if not any(f"{key}.".startswith(f"{name}.") for name in ignored)
    ]
    changed = [row for row in changed if row[1] != row[2]]
    if changed:
        key, old, new = changed[0]
        more = f" (and {len(changed) - 1} more keys differ)" if len(changed) > 1 else ""
        raise UserError(f"--resume: {source} was started with {key} {old!r}, now it is {new!r}{more}; {RESUME_HINT}")


def plain(cfg: CfgNode | dict[str, Any]) -> dict[str, Any]:
    """A config as it comes back from its own yaml: tuples are lists."""
    return yaml.safe_load(cfg.dump() if isinstance(cfg, CfgNode) else yaml.safe_dump(cfg))


def remember_request(path: Path, request: dict[str, Any], result: Path) -> bool:
    """Note in the file `path` what a command was asked for, and refuse its folder for any other request.

    Args:
        result: the first file that the command makes of a request. Until it is there, a request that failed may be
            corrected.
        request: option → value, of those that a second call must repeat.
    Returns:
        Whether this request corrects an earlier one: what that has left in the folder is stale.
    Raises:
        UserError: the folder holds something else; names the first option that differs and both values.
    """
    output, request = path.parent, json.loads(json.dumps(request))
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: give a folder")
    output.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or not result.is_file():
        if not path.is_file() and any(output.iterdir()):
            raise UserError(f"--output {output} is not empty and holds no distillation: give another folder")
        corrects = path.is_file() and json.loads(path.read_text(encoding="utf-8")) != request
        write_text(path, json.dumps(request, indent=1))
        return corrects
    before = json.loads(path.read_text(encoding="utf-8"))
    for option, value in request.items():
        if before.get(option) != value:
            raise UserError(
                f"--output {output} holds another distillation: --{option.replace('_', '-')} was {before.get(option)}, "
                f"is {value}. Give the same arguments to resume, or another --output"
            )
    return False
