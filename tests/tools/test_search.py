"""tools/search.py: equal tries, a choice by the search alone, and nothing trained twice after an interruption."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from helpers import ROOT, forked
from kd_core.losses.feature_config import distils
from kd_core.utils.errors import UserError

TABLE = {
    "package": "classification",
    "tries": 2,
    "design_seed": 0,
    "options": {"SOLVER.EPOCHS": 1, "KD.TEACHER.CACHE_DIR": "logits_{seed}"},  # 2 iterations
    "teacher": {"config": "configs/Digits/cls_teacher.yaml", "options": {"SOLVER.EPOCHS": 0.1}},
    "search": {"seed": 100, "options": {"DATA.HELD_OUT": 50}},
    "test": {"seeds": [0], "options": {}},
    "methods": {"DKD": {"config": "configs/Digits/cls_dkd.yaml", "grid": {"SOLVER.BASE_LR": [0.05, 1e30]}}},
}
SHORT = ["DATA.TRAIN_IMAGES", "24", "DATA.VAL_IMAGES", "20", "SOLVER.IMS_PER_BATCH", "12", "REPORT.ENABLED", "False"]


def write_table(folder: Path, **changes: object) -> Path:
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump({**TABLE, **changes}, sort_keys=False))
    return path


def read_results(folder: Path) -> list[dict]:
    return json.loads((folder / "out" / "results.json").read_text())["trainings"]


def add(search, training, value: float | None) -> None:
    """The entry of a training that has ended with `value`."""
    search.results.add(
        {"training": training.key, "value": value} | search.origin(0, training.config, search.words(training))
    )


def has_trained_a_student(folder: Path) -> bool:
    return (folder / "out" / "results.json").is_file() and len(read_results(folder)) > 1


def test_a_search_stopped_in_time_and_interrupted_resumes_counts_a_failed_try_and_tests_the_best_on_fresh_seeds(
    tmp_path: Path,
) -> None:
    """tools/gpu_tables.py begins it, tools/search.py goes on with the same options."""
    words = ["--output", str(tmp_path / "out"), *SHORT, "DEVICE", "cpu"]
    table = write_table(tmp_path)
    without = forked.run(["tools/gpu_tables.py", "--table", table], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert without.returncode == 1 and "gpu_tables: torch finds no GPU here" in without.stderr
    stopped = forked.run(["tools/gpu_tables.py", "--table", table, "--minutes", 0.002, *words])
    assert stopped.returncode == 1 and "the time is over; run the same command again to resume" in stopped.stderr
    assert (tmp_path / "out" / "report.md").is_file() and not (tmp_path / "out" / "search").exists()

    command = ["tools/search.py", table, "DATA.RESIDENT", "True", *words]
    with forked.started_command(command, tmp_path / "said") as interrupted:
        while interrupted.exitcode is None and not has_trained_a_student(tmp_path):
            time.sleep(0.05)
        os.killpg(interrupted.pid, signal.SIGINT)
        interrupted.join(60)
    assert "[search] interrupted; run the same command" in (tmp_path / "said.err").read_text()
    assert [entry["training"] for entry in read_results(tmp_path)[:2]] == ["teacher", "search/DKD/try0_seed100"]
    weights = tmp_path / "out" / "search" / "DKD" / "try0_seed100" / "last.pth"
    written = weights.stat().st_mtime_ns

    done = forked.run(command, timeout=900)
    assert done.returncode == 0, done.stderr
    _, good, failed, tested = read_results(tmp_path)
    assert weights.stat().st_mtime_ns == written
    assert (failed["training"], failed["value"], failed["exit"]) == ("search/DKD/try1_seed100", None, 3)
    assert (tested["training"], tested["config"]) == ("test/DKD/try0_seed0", "configs/Digits/cls_dkd.yaml")
    assert "logits_100" in good["overrides"] and "logits_0" in tested["overrides"]
    assert "DATA.HELD_OUT" in good["overrides"] and "DATA.HELD_OUT" not in tested["overrides"]
    last = (tmp_path / "out" / tested["training"] / "metrics.json").read_text().splitlines()[-1]
    assert tested["value"] == json.loads(last)["val/top1"]
    assert {"cores", "threads", "machine", "versions", "seed", "overrides"} <= set(good)
    cells = [cell.strip() for cell in (tmp_path / "out" / "report.md").read_text().splitlines()[-1].split("|")[1:-1]]
    value = f"{tested['value']:.2f}"
    assert cells == ["DKD", value, "1", f"{good['value']:.2f}", "2", "1", "SOLVER.BASE_LR 0.05"]


def test_a_plain_student_is_trained_beside_the_teacher_and_also_if_that_diverges(tmp_path: Path) -> None:
    plain = {"config": "configs/Digits/cls_baseline.yaml", "teacher": False}
    table = write_table(
        tmp_path,
        tries=1,
        options={"SOLVER.EPOCHS": 1},
        teacher={**TABLE["teacher"], "options": {"SOLVER.EPOCHS": 1, "SOLVER.BASE_LR": 1e30}},
        methods={"DKD": TABLE["methods"]["DKD"], "plain": plain},
    )
    words = ["tools/search.py", table, "--output", str(tmp_path / "out"), *SHORT]
    without = forked.run([*words, "--methods", "plain", "plain"], timeout=900)
    assert without.returncode == 0, without.stderr
    assert [entry["training"] for entry in read_results(tmp_path)] == ["test/plain/try0_seed0"]
    assert not (tmp_path / "out" / "teacher").exists()

    (tmp_path / "out" / "results.json").unlink()
    done = forked.run([*words, "--jobs", "2"], timeout=900)
    assert done.returncode == 1 and "search: the teacher diverged; its message is above" in done.stderr, done.stderr
    assert [entry["training"] for entry in read_results(tmp_path)] == ["test/plain/try0_seed0"]
    assert "test/DKD" not in done.stdout


def test_an_evaluation_that_a_kill_repeated_counts_once(load_tool, tmp_path: Path) -> None:
    lines = [{"iteration": 2, "val/top1": 1.0}, {"iteration": 4, "val/top1": 2.0}, {"iteration": 4, "val/top1": 2.0}]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    found = load_tool("search").evaluations(tmp_path / "metrics.json", "val/top1")
    assert found == {"value": 2.0, "curve": [[2, 1.0], [4, 2.0]]}


def test_a_failed_test_is_trained_again_and_one_that_fails_again_is_the_exit_status(load_tool, tmp_path: Path) -> None:
    tool = load_tool("search")
    bad = {"config": "configs/Digits/cls_dkd.yaml", "grid": {"SOLVER.BASE_LR": [-1.0]}}
    table = write_table(tmp_path, tries=1, methods={"DKD": TABLE["methods"]["DKD"], "bad": bad})
    words = ["--output", str(tmp_path / "out"), *SHORT]
    search = tool.Search(tool.read_table(table), tool.parse([str(table), *words]), tmp_path / "out")
    search.output.mkdir()
    for training in search.tests():  # as after a full disk
        add(search, training, None)
    done = forked.run(["tools/search.py", table, *words], timeout=900)
    assert done.returncode == 1 and "search: test/bad/try0_seed0 failed; run the same command" in done.stderr, (
        done.stderr
    )
    found = {entry["training"]: entry["value"] for entry in read_results(tmp_path)}
    assert found["test/DKD/try0_seed0"] > 0 and found["test/bad/try0_seed0"] is None
    assert [line.split("|")[-2].strip() for line in done.stdout.splitlines() if line.startswith("| bad")] == ["1"]


def test_of_failed_tries_only_those_that_diverged_stay_failed(load_tool, tmp_path: Path) -> None:
    tool, path = load_tool("search"), write_table(tmp_path)
    search = tool.Search(tool.read_table(path), tool.parse([str(path)]), tmp_path)
    full_disk, diverged = search.searches()
    assert search.is_missing(full_disk) and search.is_missing(diverged)
    search.results.add({"training": full_disk.key, "value": None, "exit": 1})
    search.results.add({"training": diverged.key, "value": None, "exit": 3})
    assert search.is_missing(full_disk) and not search.is_missing(diverged)


def test_a_second_process_on_the_same_output_is_refused(load_tool, tmp_path: Path) -> None:
    tool, words = load_tool("search"), [str(write_table(tmp_path)), "--output", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    with tool.held(tmp_path / "out"):
        with pytest.raises(UserError, match=r"another tools/search\.py works in"):
            tool.main(words)
        assert "DKD" in tool.main([*words, "--report"])
    with tool.held(tmp_path / "out"):
        pass


def test_a_result_of_a_config_file_that_has_changed_is_refused_but_drawn(load_tool, tmp_path: Path) -> None:
    tool, config = load_tool("search"), tmp_path / "dkd.yaml"
    config.write_text(f"_BASE_: {ROOT / 'configs' / 'Digits' / 'cls_dkd.yaml'}\n")
    path = write_table(tmp_path, tries=1, methods={"DKD": {"config": str(config), "grid": {}}})
    words = [str(path), "--output", str(tmp_path)]
    search = tool.Search(tool.read_table(path), tool.parse(words), tmp_path)
    add(search, search.tests()[0], 61.0)
    config.write_text(config.read_text() + "# a comment\n")
    assert tool.Search(tool.read_table(path), tool.parse(words), tmp_path).report() == search.report()
    config.write_text(config.read_text() + "SOLVER: {BASE_LR: 0.3}\n")
    with pytest.raises(UserError, match=r"dkd.yaml, or its _BASE_, has changed since test/DKD/try0_seed0 was trained"):
        tool.main(words)
    assert "61.00" in tool.main([*words, "--report"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tries": 0}, "tries is 0, expected a whole number from 1"),
        ({"trials": 3}, "is no table: it has the unknown key trials; a table has package, tries"),
        ({"methods": {"DKD": {"grid": {}}}}, "methods.DKD has no config"),
        ({"methods": {"DKD": {"config": "a.yaml", "gird": {}}}}, "methods.DKD.gird: {} is wrong or unknown"),
        ({"methods": {"DKD": {"config": "a.yaml", "grid": {"SEED": 1}}}}, "grid.SEED is 1, expected a list"),
        ({"methods": {"DKD": {"config": "a.yaml", "grid": {"SEED": "12"}}}}, "grid.SEED is '12', expected a list"),
        ({"test": {"seeds": [0, 1, 0], "options": {}}}, r"test\.seeds \[0, 1, 0\] has a seed twice"),
    ],
)
def test_a_table_that_is_wrong_is_refused(changes: dict, message: str, load_tool, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_tool("search").main([str(write_table(tmp_path, **changes))])


def test_no_jobs_and_no_minutes_are_refused(load_tool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        load_tool("search").main([str(write_table(tmp_path)), "--jobs", "0"])
    assert "--jobs: 0: expected a whole number from 1" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--minutes is -1\.0, expected a number above 0"):
        load_tool("search").main([str(write_table(tmp_path)), "--minutes", "-1"])


def test_a_page_draws_from_results_with_options_and_names_a_table_that_is_elsewhere(load_tool, tmp_path: Path) -> None:
    tool, path = load_tool("search"), ROOT / "configs" / "Search" / "cls_digits.yaml"
    words = ["SOLVER.EPOCHS", "1"]
    search = tool.Search(tool.read_table(path), tool.parse([str(path), *words]), tmp_path)
    add(search, search.searches()[0], 61.0)
    results = (tmp_path / "results.json").rename(tmp_path / "cls_digits.json")
    assert tool.of_results(results).report() == search.report()
    results.write_text(results.read_text().replace('"config": "', '"config": "other/'))
    with pytest.raises(UserError, match=r"/cls_digits\.json: search/.* was trained with other options"):
        tool.of_results(results)
    own = write_table(tmp_path)
    other = tool.Search(tool.read_table(own), tool.parse([str(own)]), tmp_path / "own")
    other.output.mkdir()
    add(other, other.searches()[0], 61.0)
    with pytest.raises(UserError, match=r"is of table\.yaml, which is not in configs/Search"):
        tool.of_results(tmp_path / "own" / "results.json")


def test_a_table_of_one_try_has_no_search_and_its_published_values_have_a_column(load_tool, tmp_path: Path) -> None:
    tool = load_tool("search")
    methods = {"DKD": {"config": "configs/Digits/cls_dkd.yaml", "published": 12.5, "grid": {}}}
    path = write_table(tmp_path, tries=1, methods=methods)
    search = tool.Search(tool.read_table(path), tool.parse([str(path)]), tmp_path)
    assert search.searches() == [] and [training.key for training in search.tests()] == ["test/DKD/try0_seed0"]
    search.results.add({"training": "teacher", "value": 70.0})
    search.results.add({"training": "test/DKD/try0_seed0", "value": 61.5})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in search.report().splitlines()]
    assert rows[0] == ["", "test val/top1", "seeds", "published"] and rows[-1] == ["DKD", "61.50", "1", "12.5"]


def test_the_try_with_the_highest_search_result_is_chosen_whatever_the_test_says(load_tool, tmp_path: Path) -> None:
    tool = load_tool("search")
    method = {"config": "configs/Digits/cls_dkd.yaml", "grid": {"SOLVER.BASE_LR": [0.05, 0.1, 0.2]}}
    path = write_table(tmp_path, tries=3, methods={"DKD": method}, test={"seeds": [0, 1], "options": {}})
    args = tool.parse([str(path), "--output", str(tmp_path)])
    search = tool.Search(tool.read_table(path), args, tmp_path)
    for training, value in zip(search.searches(), (50.0, 70.0, 70.0), strict=True):
        add(search, training, value)
    assert search.best("DKD") == 1
    assert [training.key for training in search.tests()] == ["test/DKD/try1_seed0", "test/DKD/try1_seed1"]
    for training, value in zip(search.tests(), (60.0, 62.0), strict=True):
        add(search, training, value)
    assert "61.00 ± 1.41" in search.report() and "70.00" in search.report()
    assert tool.Search(tool.read_table(path), args, tmp_path).report() == search.report()


def test_a_design_starts_at_the_config_repeats_nothing_and_is_that_of_its_seed(load_tool) -> None:
    tool = load_tool("search")
    grid = {"a": [1, 2, 3], "b": [True, False]}
    points = tool.design(grid, 6, 0, "DKD")
    assert points[0] == {"a": 1, "b": True} and len({tuple(point.values()) for point in points}) == 6
    assert points[:4] == tool.design(grid, 4, 0, "DKD")
    assert len({str(tool.design(grid, 6, seed, "DKD")) for seed in range(5)}) > 1
    with pytest.raises(UserError, match=r"methods.DKD.grid has 6 points, fewer than the 8 tries"):
        tool.design(grid, 8, 0, "DKD")


def test_a_table_may_grow_but_a_result_of_other_options_is_refused(load_tool, tmp_path: Path) -> None:
    tool = load_tool("search")

    def search_of(**changes: object):
        path = write_table(tmp_path, test={"seeds": [0, 1], "options": {}}, **changes)
        return tool.Search(tool.read_table(path), tool.parse([str(path)]), tmp_path)

    dkd = TABLE["methods"]["DKD"]
    first = search_of(tries=1)
    for training in first.tests():
        add(first, training, 60.0)
    grown = {"DKD": dkd, "KD": {"config": "configs/Digits/cls_kd.yaml", "grid": {}}}
    second = search_of(tries=1, methods=grown)
    assert [second.value(training) for training in second.tests()] == [60.0, None, 60.0, None]

    message = r"results.json: test/DKD/try0_seed0 was trained with other options than the table has now"
    for changes in (
        {"methods": {"DKD": dkd | {"config": "configs/Digits/cls_kd.yaml"}}},
        {"methods": {"DKD": {**dkd, "grid": {"SOLVER.BASE_LR": [0.1]}}}},
        {"options": {"SOLVER.EPOCHS": 2}},
    ):
        with pytest.raises(UserError, match=message):
            search_of(tries=1, **changes)
    first.results.add({"training": "teacher", "value": 70.0} | first.origin(0, "configs/Digits/cls_teacher.yaml", ()))
    with pytest.raises(UserError, match=r"results.json: teacher was trained with other options"):
        search_of(tries=1)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "finished").write_text('["configs/Digits/cls_kd.yaml"]')
    with pytest.raises(UserError, match=r"teacher is of another table: remove it, or choose another --output"):
        second.lacks_teacher()


def test_results_of_another_table_or_with_other_options_are_not_mixed(load_tool, tmp_path: Path) -> None:
    tool = load_tool("search")
    (tmp_path / "out").mkdir()
    for table, options, name in (("other.yaml", [], "table"), ("table.yaml", ["SEED", "1"], "command line options")):
        found = {"table": table, "command line options": options, "trainings": []}
        (tmp_path / "out" / "results.json").write_text(json.dumps(found))
        with pytest.raises(UserError, match=f"results.json is of another {name}"):
            tool.main([str(write_table(tmp_path)), "--output", str(tmp_path / "out"), "--report"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "Search").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_table_of_ours_gives_every_method_as_many_tries_of_configs_that_read(path: Path, load_tool) -> None:
    tool = load_tool("search")
    table = tool.read_table(path)
    assert f"tools/search.py {path.relative_to(ROOT)}" in path.read_text()
    for name, method in table["methods"].items():
        for point in tool.design(method["grid"], table["tries"], table["design_seed"], name):
            words = tool.words_of(table["options"]) + tool.words_of(point)
            cfg = read_config(table["package"], str(ROOT / method["config"]), list(words))
            assert distils(cfg.KD) is method.get("teacher", True)
    own = {name: read_config(table["package"], str(ROOT / m["config"]), []) for name, m in table["methods"].items()}
    for name, cfg in own.items():  # the first try is the config as it stands
        grid = table["methods"][name]["grid"]
        for key, value in tool.design(grid, 1, 0, name)[0].items():  # but for what every try has
            assert lookup(cfg, key) == value or len(grid[key]) == 1, (name, key)


def read_config(package: str, path: str, words: list[str]):
    if package == "classification":
        from kd_cls.config import load_cfg

        return load_cfg(path, words)
    from kd_det.config import kd_defaults, merge_file, merge_list

    cfg = kd_defaults()
    merge_file(cfg, path)
    merge_list(cfg, words)
    return cfg


def lookup(cfg, key: str):
    for name in key.split("."):
        cfg = cfg[name]
    return cfg
