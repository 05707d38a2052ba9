"""Reading configs: yaml files with `_BASE_`, `KEY VALUE` words, and errors that name the key, the value and the fix."""

import ast
import difflib
import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from detectron2.config import CfgNode

KINDS = {
    float: "a number",
    int: "a whole number",
    bool: "True or False",
    str: "a word",
    list: "a list",
    tuple: "a list",
}
COMMAND_LINE = "the command line"


def merge_file(cfg: CfgNode, path: str) -> None:
    """Merge a yaml file and its `_BASE_` files into `cfg`.

    Raises:
        ValueError: no yaml, with file and line; a key that does not exist, with the nearest that does; a value of the
        wrong type.
    """
    loaded = CfgNode(read_yaml(path))
    if loaded.get("VERSION", cfg.VERSION) != cfg.VERSION:
        # detectron2 upgrades configs of older versions
        merge_checked(cfg, lambda: cfg.merge_from_file(path, allow_unsafe=False), path, loaded)
        return
    coerce_numbers(loaded, cfg)
    merge_checked(cfg, lambda: cfg.merge_from_other_cfg(loaded), path, loaded)


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a yaml file, its `_BASE_` files merged underneath."""
    no_keys = f"{path} holds no keys: a config is a mapping like 'SOLVER: {{MAX_ITER: 1000}}'"
    try:
        loaded = CfgNode.load_yaml_with_base(path, allow_unsafe=False)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}" if mark else path
        raise ValueError(f"{place}: no yaml that can be read ({error.problem or error.context})") from error
    except yaml.YAMLError as error:  # bytes that are no text
        raise ValueError(f"{path}: no yaml that can be read ({' '.join(str(error).split())})") from error
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no file {error.filename}, which a _BASE_ of it names") from error
    except (TypeError, AttributeError) as error:  # fvcore looks for _BASE_ in what is no mapping
        raise ValueError(no_keys) from error
    if not isinstance(loaded, dict):
        raise ValueError(no_keys)
    return loaded


def merge_list(cfg: CfgNode, options: list[str]) -> None:
    """Merge `KEY VALUE` pairs of a command line into `cfg`; errors as in `merge_file`."""
    if len(options) % 2:
        raise ValueError(
            f"Overrides come as KEY VALUE pairs, but {' '.join(options)!r} has an odd number of words; a list needs "
            "quotes, as in SOLVER.STEPS '(60, 80)'"
        )
    keys = list(all_keys(cfg))
    for key, word in zip(options[::2], options[1::2], strict=True):
        if key not in keys:
            raise ValueError(f"{COMMAND_LINE}: unknown key {key}{nearest(key, keys)}")
        pair = [key, as_word(word, lookup(cfg, key))]
        merge_checked(cfg, lambda pair=pair: cfg.merge_from_list(pair), COMMAND_LINE, {key: word})


def as_word(word: str, default: Any) -> str:
    """`word` such that yacs reads a float, or a string, where the default is one: it refuses 8 for 8.0 or "8"."""
    if isinstance(default, float) and word.lstrip("+-").isdigit():
        return f"{word}.0"
    if isinstance(default, str) and not is_quoted(word):
        return repr(word)
    return word


def is_quoted(word: str) -> bool:
    """Whether `word` is a Python string."""
    try:
        return isinstance(ast.literal_eval(word), str)
    except (ValueError, SyntaxError):
        return False


def merge_checked(cfg: CfgNode, merge: Callable[[], None], source: str, values: dict[str, Any]) -> None:
    """Run `merge` of `values` and say in one sentence what yacs found wrong, and where."""
    try:
        merge()
    except KeyError as error:
        key = str(error.args[0]).split(": ")[-1]
        raise ValueError(f"{source}: unknown key {key}{nearest(key, list(all_keys(cfg)))}") from error
    except AssertionError as error:  # of detectron2's, on versions
        raise ValueError(f"{source}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {mismatch(cfg, values, str(error))}") from error


def mismatch(cfg: CfgNode, values: dict[str, Any], message: str) -> str:
    """yacs' message of a wrong type, in terms of the key, the value and one that would do."""
    named = re.search(r"config key: (\S+)$", message)
    if named is None:
        return message
    key = named[1]
    default, value = lookup(cfg, key), values.get(key, lookup(values, key))
    if isinstance(default, CfgNode):
        return f"{key} is a group of keys ({', '.join(default)}), got {value!r}"
    return f"{key} is {value!r}, expected {KINDS.get(type(default), type(default).__name__)} such as {default!r}"


def coerce_numbers(loaded: CfgNode, cfg: CfgNode) -> None:
    """Turn whole numbers into floats where the default is a float: yacs refuses `BETA: 8`."""
    for key, value in loaded.items():
        default = cfg.get(key)
        if isinstance(value, CfgNode) and isinstance(default, CfgNode):
            coerce_numbers(value, default)
        elif isinstance(default, float) and type(value) is int:
            loaded[key] = float(value)


def nearest(key: str, keys: list[str]) -> str:
    """`; did you mean …?` with the key that differs by a letter, else those of the same name and those most like it."""
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.9)
    if not near:
        same_name = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
        near = list(dict.fromkeys(same_name + difflib.get_close_matches(key, keys, n=3)))
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def lookup(cfg: dict[str, Any], key: str) -> Any:
    """The value under a dotted key, None where there is none."""
    value: Any = cfg
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def all_keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """Every dotted key of `cfg`, groups included."""
    for key, value in cfg.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from all_keys(value, f"{prefix}{key}.")
