"""Reading configs: yaml files with `_BASE_`, `KEY VALUE` words, and errors that name the key, the value and the fix.

Everything here takes a CfgNode of fvcore or of a library that subclasses it, such as detectron2.
"""

import ast
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from kd_core.utils.errors import UserError, one_line

KINDS = {
    float: "a number",
    int: "a whole number",
    bool: "True or False",
    str: "a word",
    list: "a list",
    tuple: "a list",
}
COMMAND_LINE = "the command line"
PACKAGES = Path(__file__).resolve().parents[2]  # the clone, or the folder that a wheel was installed into


def merge_mapping(cfg: CfgNode, values: dict[str, Any], source: str) -> None:
    """Merge nested `values` into `cfg`, checking name and type of each.

    Raises:
        UserError: names `source`, the key, its value and what is expected or nearest.
    """
    merge_group(cfg, values, source, "", list(all_keys(cfg)))


def merge_list(cfg: CfgNode, words: Sequence[str]) -> None:
    """Merge the `KEY VALUE` words of a command line into `cfg`; errors as in `merge_mapping`."""
    if late := [word for word in words if word.startswith("--")]:
        raise UserError(f"{COMMAND_LINE}: {late[0]} comes after KEY VALUE words: options go before them")
    if len(words) % 2:
        raise UserError(
            f"Overrides come as KEY VALUE pairs, but {' '.join(words)!r} has an odd number of words; a list needs "
            "quotes, as in KEY '(60, 80)'"
        )
    keys = list(all_keys(cfg))
    for key, word in zip(words[::2], words[1::2], strict=True):
        if key not in keys:
            raise UserError(f"{COMMAND_LINE}: unknown key {key}{nearest(key, keys)}")
        group, _, name = key.rpartition(".")
        merge_group(lookup(cfg, group) if group else cfg, {name: unquote(word)}, COMMAND_LINE, key[: -len(name)], keys)


def find_config(name: str) -> str:
    """`name` where there is such a file, else the file of one of the shipped configs: "COCO/dkd_r18_r101.yaml".

    A wheel brings configs/ as the package kd_configs. A name that is neither comes back as it is.
    """
    if Path(name).is_file():
        return name
    shipped = name.removeprefix("configs/")
    for folder in (PACKAGES / "kd_configs", PACKAGES / "configs"):
        if shipped and (folder / shipped).is_file():
            return str(folder / shipped)
    return name


def read_yaml(path: str, kind: type[CfgNode] = CfgNode, trusted: bool = False) -> dict[str, Any]:
    """The mapping in a yaml file, its `_BASE_` files merged underneath.

    Args:
        path: of the file, or a name that `find_config` knows.
        kind: how its `_BASE_` files are found: detectron2's CfgNode knows more kinds of paths than fvcore's.
        trusted: the file is part of an installed package, and may hold yaml tags that run code.
    """
    path = find_config(path)
    no_keys = f"{path} holds no keys: a config is a mapping like 'SOLVER: {{BASE_LR: 0.1}}'"
    try:
        loaded = kind.load_yaml_with_base(path, allow_unsafe=trusted)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}" if mark else path
        raise UserError(f"{place}: not valid yaml ({error.problem or error.context})") from error
    except yaml.YAMLError as error:  # bytes that are not text
        raise UserError(f"{path}: not valid yaml ({one_line(error)})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, or a _BASE_ of it, is not text in UTF-8 ({one_line(error)})") from error
    except RecursionError as error:
        raise UserError(f"{path}: its _BASE_ leads back to the file itself") from error
    except FileNotFoundError as error:
        if error.filename == path:
            raise UserError(f"there is no file {path}") from error
        raise UserError(f"{path}: _BASE_ names {error.filename}, which does not exist") from error
    except (TypeError, AttributeError) as error:  # fvcore looks for _BASE_ in what is not a mapping
        raise UserError(no_keys) from error
    if not isinstance(loaded, dict):
        raise UserError(no_keys)
    return loaded


def merge_group(node: CfgNode, values: dict[str, Any], source: str, prefix: str, keys: list[str]) -> None:
    """As `merge_mapping`, for the group under `prefix` of a config whose dotted keys are `keys`."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in node:
            raise UserError(f"{source}: unknown key {key}{nearest(key, keys)}")
        if not isinstance(node[name], CfgNode):
            node[name] = coerce(value, node[name], key, source)
            continue
        group = parse_word(value) if isinstance(value, str) else value
        if not isinstance(group, dict):
            raise UserError(f"{source}: {key} is a group of keys ({', '.join(node[name])}), got {value!r}")
        merge_group(node[name], group, source, f"{key}.", keys)


def coerce(value: Any, default: Any, key: str, source: str) -> Any:
    """`value` as the type of `default`: 8 and 1e-3 become floats, lists tuples and the reverse.

    Raises:
        UserError: the value has another type; names key, value and the type expected.
    """
    kind = type(default)
    found = parse_word(value) if isinstance(value, str) and kind is not str else value
    if kind is float and isinstance(found, int | str) and not isinstance(found, bool):
        try:
            return float(found)
        except ValueError:  # reported below
            pass
    if kind in (list, tuple) and isinstance(found, list | tuple):
        return kind(found)
    if type(found) is kind or default is None:
        return found
    raise UserError(f"{source}: {key} is {value!r}, expected {KINDS.get(kind, kind.__name__)} such as {default!r}")


def parse_word(word: str) -> Any:
    """The value that a word stands for, as a Python literal or as yaml: (6, 8), [a, b], true; else the word itself."""
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError, TypeError):
        pass
    if word.startswith("(") and word.endswith(")"):  # a tuple of words without quotes
        word = f"[{word[1:-1].rstrip(', ')}]"
    try:
        return yaml.safe_load(word)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
        return word


def unquote(word: Any) -> Any:
    """A word without the quotes around it."""
    quoted = isinstance(word, str) and len(word) > 1 and word[0] == word[-1] and word[0] in "'\""
    return word[1:-1] if quoted else word


def nearest(key: str, keys: list[str]) -> str:
    """`; did you mean …?` with the key that differs by a letter, else those of the same name and those most like it."""
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.9)
    if not near:
        same_name = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
        near = list(dict.fromkeys(same_name + difflib.get_close_matches(key, keys, n=3)))
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def lookup(tree: dict[str, Any], key: str) -> Any:
    """The value under a dotted key; None where there is none."""
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def all_keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Every dotted key, groups included."""
    for name, value in tree.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from all_keys(value, f"{prefix}{name}.")


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """The values of a config, or of nested dicts, by dotted key; groups are left out."""
    values = {key: lookup(tree, key) for key in all_keys(tree)}
    return {key: value for key, value in values.items() if not isinstance(value, dict)}


def list_values(cfg: CfgNode, prefixes: Sequence[str] = ()) -> str:
    """`KEY VALUE` lines of a config, or only those under one of `prefixes`.

    Raises:
        UserError: there are none.
    """
    found = [
        f"{key} {value!r}"
        for key, value in flatten(cfg).items()
        if not prefixes or any(f"{key}.".startswith(f"{prefix}.") for prefix in prefixes)
    ]
    if not found:
        raise UserError(f"--list-keys: there are no keys under {' or '.join(prefixes)}")
    return "\n".join(found)


def set_values(cfg: CfgNode, values: Mapping[str, Any]) -> None:
    """Set dotted keys."""
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        (lookup(cfg, group) if group else cfg)[name] = value


def changes_as_yaml(cfg: CfgNode, defaults: CfgNode, header: str) -> str:
    """The keys of `cfg` that differ from the defaults, under a comment: a file that its owner can read."""
    before, tree = flatten(defaults), {}
    for key, value in flatten(cfg).items():
        if value != before[key]:
            *groups, name = key.split(".")
            node = tree
            for group in groups:
                node = node.setdefault(group, {})
            node[name] = as_lists(value)
    return header + yaml.safe_dump(tree, default_flow_style=None, sort_keys=False)


def as_lists(value: Any) -> Any:
    """Tuples, nested ones too, as lists: yaml has no tuples."""
    return [as_lists(item) for item in value] if isinstance(value, list | tuple) else value
