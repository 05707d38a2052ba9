"""What `--resume` means, in detection as in classification: the same run goes on, or the command refuses."""

from collections.abc import Collection
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from kd_core.utils.config import flatten
from kd_core.utils.errors import UserError

RESUME_HINT = "that would mix two runs: resume with the config of the checkpoint, or train in another OUTPUT_DIR"


def check_same_run(
    saved: dict[str, Any], cfg: CfgNode, defaults: CfgNode, ignored: Collection[str], source: str
) -> None:
    """Refuse to resume with another method, teacher, loss, optimizer, schedule, data set or student.

    A key that `saved` lacks was added by a later version: it counts as its default. A key that is no longer in `cfg`
    is left out.

    Args:
        saved: the config of the run, nested dicts.
        cfg: the config to resume with.
        defaults: the package's default config.
        ignored: keys, and groups of keys, that may differ.
        source: where `saved` was found.

    Raises:
        UserError: names the first key that differs and both values.
    """
    before, now, default = (flatten(tree) for tree in (saved, plain(cfg), plain(defaults)))
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


def plain(cfg: CfgNode) -> dict[str, Any]:
    """A config as it comes back from its own yaml: tuples are lists."""
    return yaml.safe_load(cfg.dump())
