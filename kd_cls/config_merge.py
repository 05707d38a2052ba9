"""Reading configs: yaml files with `_BASE_`, `KEY VALUE` words, and errors that name the key, the value and the fix."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a yaml file, its `_BASE_` files merged underneath."""
    if not Path(path).is_file():
        raise ValueError(f"--config-file: there is no file {path}")
    no_keys = f"{path} holds no keys: a config is a mapping like 'MODEL: {{NAME: resnet18}}'"
    try:
        loaded = CfgNode.load_yaml_with_base(path, allow_unsafe=False)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no yaml that can be read: {error}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{path}: _BASE_ names {error.filename}, which does not exist") from error
    except TypeError as error:  # fvcore looks for _BASE_ in an empty file's None
        raise ValueError(no_keys) from error
    if not isinstance(loaded, dict):
        raise ValueError(no_keys)
    return loaded


def merge_mapping(cfg: CfgNode, values: dict[str, Any], source: str) -> None:
    """Merge nested `values` into `cfg`, checking name and type of each.

    Raises:
        ValueError: names `source`, the key, its value and what is expected or nearest.
    """
    merge_node(cfg, values, source, "", list(all_keys(cfg)))


def merge_node(node: CfgNode, values: dict[str, Any], source: str, prefix: str, keys: list[str]) -> None:
    """As `merge_mapping`, for the node under `prefix` of a config that has `keys`."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in node:
            raise ValueError(f"{source}: unknown key {key}{nearest(key, keys)}")
        if not isinstance(node[name], CfgNode):
            node[name] = coerce(value, node[name], key, source)
        elif isinstance(value, dict):
            merge_node(node[name], value, source, key + ".", keys)
        else:
            raise ValueError(f"{source}: {key} is a group of keys ({', '.join(node[name])}), got {value!r}")


def merge_options(cfg: CfgNode, options: list[str]) -> None:
    """Merge the `KEY VALUE` words of a command line into `cfg`; errors as in `merge_mapping`."""
    if len(options) % 2:
        raise ValueError(f"Overrides come as KEY VALUE pairs, but {' '.join(options)!r} has an odd number of words")
    for key, word in zip(options[::2], options[1::2], strict=True):
        value: Any = word if isinstance(lookup(cfg, key), str) else parse_word(word)
        for part in reversed(key.split(".")):
            value = {part: value}
        merge_mapping(cfg, value, "the command line")


def lookup(cfg: CfgNode, key: str) -> Any:
    """The value under a dotted key; None where there is none."""
    value: Any = cfg
    for part in key.split("."):
        value = value.get(part) if isinstance(value, CfgNode) else None
    return value


def parse_word(word: str) -> Any:
    """The yaml value of a word of the command line; Python's tuples are lists."""
    if word.startswith("(") and word.endswith(")"):
        word = f"[{word[1:-1].rstrip(', ')}]"
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def coerce(value: Any, default: Any, key: str, source: str) -> Any:
    """`value` as the type of `default`: whole numbers and words like 1e-3 become floats, tuples lists.

    Raises:
        ValueError: the value has another type; names key, value and the type expected.
    """
    kind = type(default)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if kind is list and isinstance(value, tuple):
        return list(value)
    if type(value) is kind:
        return value
    names = {float: "a number", int: "a whole number", bool: "True or False", str: "a word", list: "a list"}
    raise ValueError(f"{source}: {key} is {value!r}, expected {names[kind]} such as {default!r}")


def nearest(key: str, keys: list[str]) -> str:
    """`; did you mean …?` with those of `keys` that are called the same or are most like `key`, or nothing."""
    same_name = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
    near = same_name + [known for known in difflib.get_close_matches(key, keys, n=3) if known not in same_name]
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def all_keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """Every dotted key of `cfg` that holds a value."""
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from all_keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name
