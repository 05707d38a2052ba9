"""Config files, command lines, and what is said about bad ones."""

import re
from pathlib import Path

import pytest

from kd_cls.config import config_hash, get_cfg, load_cfg
from kd_core.utils.config import all_keys
from kd_core.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# Read by kd_core.losses.build_loss, which gets the whole node.
READ_IN_KD_CORE = ("KD.LOSS.", "KD.FEATURE.")


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_base_is_merged_underneath_and_the_command_line_on_top(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "SOLVER: {EPOCHS: 7, BASE_LR: 1}\nSEED: 3\n")
    path = write(tmp_path / "top.yaml", "_BASE_: base.yaml\nSOLVER: {EPOCHS: 9}\n")
    cfg = load_cfg(path, ["SEED", "4", "MODEL.MEAN", "(0.1, 0.2, 0.3)", "KD.LOSS.DKD.BETA", "2"])
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.BASE_LR, cfg.SEED) == (9.0, 1.0, 4)
    assert cfg.MODEL.MEAN == [0.1, 0.2, 0.3] and cfg.KD.LOSS.DKD.BETA == 2.0


def test_numbers_that_yaml_reads_as_words_or_integers_become_floats(tmp_path: Path) -> None:
    cfg = load_cfg(write(tmp_path / "a.yaml", "SOLVER: {BASE_LR: 1e-3, WEIGHT_DECAY: 0}\n"))
    assert cfg.SOLVER.BASE_LR == 0.001 and isinstance(cfg.SOLVER.WEIGHT_DECAY, float)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("SOLVER: {EPOCH: 3}", [], r"unknown key SOLVER.EPOCH; did you mean SOLVER.EPOCHS"),
        ("MODEL: {BASE_LR: 3}", [], r"unknown key MODEL.BASE_LR.*SOLVER.BASE_LR"),
        ("{}", ["MODEL.NUM_CLASSES", "7"], r"MODEL.NUM_CLASSES: the data .* say how many classes"),
        ("MODEL: {META_ARCHITECTURE: GeneralizedRCNN}", [], r"a detector's config: tools/train_net.py trains it"),
        ("SEED: many", [], r"SEED is 'many', expected a whole number"),
        ("{}", ["SEED", "2024-13-45"], r"SEED is '2024-13-45', expected a whole number"),
        ("{}", ["SEED", "{[1]: 2}"], r"SEED is '{\[1\]: 2}', expected a whole number"),
        ("MODEL: resnet18", [], r"MODEL is a group of keys"),
        ("MODEL: {COMPILE: 3}", [], r"MODEL.COMPILE is 3, expected True or False"),
        ("{}", ["KD.LOSS.DKD.BETA", "eight"], r"KD.LOSS.DKD.BETA is 'eight', expected a number such as 8.0"),
        ("{}", ["KD.LOSS.DKD.GAMMA", "8"], r"the command line: unknown key KD.LOSS.DKD.GAMMA"),
        ("{}", ["SEED"], r"odd number of words"),
        ("{}", ["SEED", "1", "--resume"], r"--resume comes after KEY VALUE words: options go before them"),
        ("a: [", [], r"not valid yaml"),
        ("_BASE_: gone.yaml", [], r"_BASE_ names .*gone.yaml, which does not exist"),
        ("_BASE_: bad.yaml", [], r"bad.yaml: its _BASE_ leads back to the file itself"),
        ("- 1", [], r"holds no keys"),
        ("", [], r"holds no keys"),
        ("SEED: !!python/object/apply:os.getcwd []", [], r"not valid yaml"),
    ],
)
def test_bad_input_is_named_with_its_key(tmp_path: Path, text: str, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_cfg(write(tmp_path / "bad.yaml", text), options)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin1.yaml"
    path.write_bytes("SEED: 1  # d\u00e9but\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin1.yaml, or a _BASE_ of it, is not text in UTF-8"):
        load_cfg(str(path))


def test_a_missing_config_file_is_named() -> None:
    with pytest.raises(UserError, match=r"--config-file: there is no file nowhere.yaml"):
        load_cfg("nowhere.yaml")


def test_a_written_config_reads_back_the_same(tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.SEEDS, cfg.SOLVER.SCHEDULE.MILESTONES = [1, 2], [1.5, 3]
    assert load_cfg(write(tmp_path / "again.yaml", cfg.dump())) == cfg


def test_the_hash_ignores_where_a_run_goes_and_sees_how_it_trains() -> None:
    cfg = get_cfg()
    before = config_hash(cfg)
    cfg.OUTPUT_DIR = "elsewhere"
    assert config_hash(cfg) == before
    cfg.SOLVER.BASE_LR *= 2
    assert config_hash(cfg) != before


def test_every_key_has_a_comment_above_it() -> None:
    lines = (ROOT / "kd_cls" / "config.py").read_text().splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r"    cfg\.[A-Z_.]+ = (?!CfgNode\(\)$)", line)]
    assert len(keys) > 50
    bare = [lines[number] for number in keys if not previous_line_is_comment(lines, number)]
    assert bare == []


def previous_line_is_comment(lines: list[str], number: int) -> bool:
    """One comment may explain several keys that follow it."""
    while lines[number - 1].startswith("    cfg."):
        number -= 1
    return lines[number - 1].lstrip().startswith("#")


def test_every_key_is_read_by_something() -> None:
    read_by_both = [ROOT / "kd_core" / "optim" / "config.py"]
    own = [path for path in (ROOT / "kd_cls").rglob("*.py") if path.name != "config.py"]
    source = "".join(path.read_text() for path in own + read_by_both)
    unread = [
        key
        for key in all_keys(get_cfg())
        if not key.startswith(READ_IN_KD_CORE) and not re.search(rf"\b{key.split('.')[-1]}\b", source)
    ]
    assert unread == []
