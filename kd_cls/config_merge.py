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
    try:
        loaded = CfgNode.load_yaml_with_base(path, allow_unsafe=False)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no yaml that can be read: {error}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{path}: _BASE_ names {error.filename}, which does not exist") from error
    except TypeError as error:  # fvcore looks for _BASE_ in None or in a list
        raise ValueError(f"{path} holds no keys: a config is a mapping like 'MODEL: {{NAME: resnet18}}'") from error
    return loaded


def merge_mapping(cfg: CfgNode, values: dict[str, Any], source: str, prefix: str = "") -> None:
    """Merge nested `values` into `cfg`, checking key and type of each; errors as in `load_cfg`."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in cfg:
            raise ValueError(f"{source}: unknown key {key}{nearest(key, cfg, prefix)}")
        if isinstance(cfg[name], CfgNode):
            if not isinstance(value, dict):
                raise ValueError(f"{source}: {key} is a group of keys ({', '.join(cfg[name])}), got {value!r}")
            merge_mapping(cfg[name], value, source, key + ".")
        else:
            cfg[name] = coerce(value, cfg[name], key, source)


def merge_options(cfg: CfgNode, options: list[str]) -> None:
    """Merge the `KEY VALUE` words of a command line into `cfg`; errors as in `load_cfg`."""
    if len(options) % 2:
        raise ValueError(f"Overrides come as KEY VALUE pairs, but {' '.join(options)!r} has an odd number of words")
    for key, word in zip(options[::2], options[1::2], strict=True):
        node, name = cfg, key
        while "." in name and isinstance(node.get(name.split(".")[0]), CfgNode):
            node, name = node[name.split(".")[0]], name.split(".", 1)[1]
        if name not in node:
            raise ValueError(f"the command line: unknown key {key}{nearest(key, cfg)}")
        value = word if isinstance(node[name], str) else parse_word(word)
        merge_mapping(node, {name: value}, "the command line", key.removesuffix(name))


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


def nearest(key: str, cfg: CfgNode, prefix: str = "") -> str:
    """`; did you mean …?` with the keys most like `key`, or nothing."""
    keys = [prefix + known for known in all_keys(cfg)]
    near = difflib.get_close_matches(key, keys, n=2, cutoff=0.6)
    near += [known for known in keys if known.split(".")[-1] == key.split(".")[-1] and known not in near]
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def all_keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """Every dotted key of `cfg` that holds a value."""
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from all_keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name
