"""The page about trainings: its figures are those of metrics.json, it needs no network, and it says what is missing."""

import base64
import json
import math
import shutil
import statistics
from pathlib import Path

import pytest
import yaml

from helpers.few_digits import few_digits
from helpers.report_runs import Page, write_run
from kd_core.utils.report.results import kept
from kd_core.utils.report.runs import Run, method_title, with_common_keys
from kd_core.utils.report.tables import Metric, paired_table, seeds_table
from kd_det.evaluation.html_report import evaluation_prefixes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def report(load_tool, tmp_path):
    """`report(folder, …, *options)`: the page that the command writes."""
    tool = load_tool("report")

    def make(*words: object) -> Page:
        html = tmp_path / "page" / "report.html"
        tool.main([*map(str, words), "--html", str(html)])
        return Page(html.read_text(encoding="utf-8"))

    return make


@pytest.fixture
def three(tmp_path):
    """Teacher, plain student and DKD student."""
    teacher = write_run(tmp_path / "teacher", 60)
    return teacher, write_run(tmp_path / "plain", 40), write_run(tmp_path / "dkd", 45, teacher=teacher)


def last_values(folder) -> dict[str, float]:
    values: dict[str, float] = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        values |= json.loads(line)
    return values


def test_every_number_of_a_run_equals_metrics_json_to_the_last_digit(report, three):
    page = report(*three)
    compared = 0
    for (key, folder), shown in page.numbers.items():
        if not folder:
            continue
        expected = next(last_values(run)[key] for run in three if str(run) == folder)
        for value, text in shown:
            assert value == expected or (math.isnan(value) and math.isnan(expected))
            assert text == ("NaN" if math.isnan(expected) else f"{expected:.2f}")
            compared += 1
    assert compared == 3 * 9  # AP, AP50, AP75, by size and three classes of three runs


def test_teacher_plain_and_student_stand_side_by_side(report, three):
    page = report(*three)
    assert page.rows[0] == ["", "teacher", "plain", "DKD"]
    assert page.rows[1] == ["AP", "60.14", "40.14", "45.14"]


def test_classes_are_sorted_by_the_gap_that_remains_to_the_teacher(report, three, tmp_path):
    lines = [json.loads(line) for line in (three[2] / "metrics.json").read_text().splitlines()]
    lines[-1] |= {"bbox/AP-zero": 50.0, "bbox/AP-one": 20.0, "bbox/AP-two": math.nan}
    student = write_run(tmp_path / "other" / "dkd", teacher=three[0], lines=lines)
    rows = report(three[0], student).rows
    first = next(index for index, row in enumerate(rows) if row[0] == "class")
    assert [row[0] for row in rows[first + 1 : first + 4]] == ["one", "zero", "two"]
    assert [row[-1] for row in rows[first + 1 : first + 4]] == ["+42.72", "+10.14", "–"]


def test_the_page_loads_nothing_from_elsewhere_and_every_picture_is_a_whole_svg(report, three):
    page = report(*three)
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert len(page.images) >= 6
    for image in page.images:
        svg = base64.b64decode(image.removeprefix("data:image/svg+xml;base64,")).decode()
        assert svg.rstrip().endswith("</svg>") and "prefers-color-scheme:dark" in svg


def test_there_is_a_curve_of_ap_of_every_term_of_k_and_of_the_momenta(report, three):
    text = report(*three).text
    assert all(key in text for key in ("bbox/AP", "total_loss", "loss_cls", "loss_kd_tckd", "topk/K", "momentum/tcg"))


def test_the_teacher_of_a_student_joins_it(report, three):
    assert report(three[2]).rows[0] == ["", "teacher", "DKD"]


def test_seeds_give_mean_std_and_paired_differences(report, three, tmp_path):
    levels = {"plain": (40, 41, 43), "dkd": (44, 47, 46)}
    folders = [
        write_run(tmp_path / "seeds" / f"{name}_{seed}", level, seed, teacher=three[0] if name == "dkd" else None)
        for name, of_seed in levels.items()
        for seed, level in enumerate(of_seed)
    ]
    page = report(*folders)
    assert page.rows[0] == ["", "teacher", "plain (3 runs)", "DKD (3 runs)"]
    spread = statistics.stdev(levels["plain"])
    assert page.rows[1][2] == f"{statistics.mean(levels['plain']) + math.sqrt(2) / 10:.2f} ± {spread:.2f}"
    paired = next(row for row in page.rows if row[1:2] == ["3 (0, 1, 2)"])
    assert paired[0] == "DKD" and paired[2].startswith("+4.33 ± 1.53 · 3 of 3")
    assert "paired" not in page.text and "Difference to plain with the same seed" in page.text
    with pytest.raises(SystemExit, match="--baseline KD: the runs' methods are teacher, plain, DKD"):
        report(*folders, "--baseline", "KD")


def test_runs_whose_seeds_do_not_tell_them_apart_are_not_paired():
    def runs(title: str, *values: float, seeds: tuple = (-1, -1, -1)) -> list[Run]:
        pairs = zip(seeds, values, strict=True)
        return [Run(Path(f"{title}{v}"), {"SEED": s}, [{"iteration": 1, "a": v}], title=title) for s, v in pairs]

    groups = {"plain": runs("plain", 30, 40, 50), "DKD": runs("DKD", 31, 41, 51)}
    assert paired_table(groups, "plain", [Metric("a", "a")]).rows == []
    assert seeds_table(groups, Metric("a", "a"), "plain").header == ["", "a", "difference to plain"]
    values = {"plain": (30, 40, 9), "DKD": (31, 41, 0)}
    groups = {name: runs(name, *of_name, seeds=(0, 1, -1)) for name, of_name in values.items()}
    (row,) = paired_table(groups, "plain", [Metric("a", "a")]).rows
    assert row[1][0] == ["2 (0, 1)"]


def test_students_of_two_teachers_are_not_averaged_but_each_seed_may_have_its_own(report, three, tmp_path):
    other = write_run(tmp_path / "teacher_long", 65, max_iter=80)
    folders = [write_run(tmp_path / f"of_{teacher.name}", 45, 0, teacher=teacher) for teacher in (three[0], other)]
    heads = report(*folders).rows[0]
    assert [head for head in heads if head.startswith("DKD")] == ["DKD [of_teacher]", "DKD [of_teacher_long]"]
    seeds = [write_run(tmp_path / f"own_{seed}", 45, seed, teacher=t) for seed, t in enumerate((three[0], other))]
    assert [head for head in report(*seeds).rows[0] if head.startswith("DKD")] == ["DKD (2 runs)"]


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(report, tmp_path):
    folders = [write_run(tmp_path / "short", 40), write_run(tmp_path / "long", 41, 1, max_iter=80)]
    assert report(*folders).rows[0] == ["", "plain [short]", "plain [long]"]


@pytest.mark.parametrize(
    "loss, feature, optimizer, title",
    [
        (None, None, "torch.optim.SGD", "plain"),
        ("kd_core.losses.DKDLoss", None, "torch.optim.SGD", "DKD"),
        ("kd_core.losses.DKDLoss", None, "kd_core.optim.presets.deepkd_sgd", "DeepKD (DKD)"),
        (
            "kd_core.losses.DKDLoss",
            None,
            "kd_core.optim.presets.deepkd_sgd_released",
            "DeepKD (DKD), released momenta",
        ),
        (None, {"_target_": "functools.partial"}, "torch.optim.SGD", "feature loss"),
        ("kd_core.losses.KDLoss", {"_target_": "functools.partial"}, "torch.optim.SGD", "KD + feature loss"),
    ],
)
def test_a_lazy_config_has_the_title_of_its_losses_and_optimizer(loss, feature, optimizer, title):
    model = {"loss": loss and {"_target_": loss}, "feature": feature}
    config = {"model": model, "dataloader": {}, "optimizer": {"_target_": optimizer}}
    assert method_title(with_common_keys(config)) == title


def test_an_unfinished_run_is_said_to_be_one_and_left_out_of_the_mean(report, tmp_path):
    lines = [{"iteration": 9, "total_loss": 1.0}, {"iteration": 19, "total_loss": 0.9}]
    folders = [write_run(tmp_path / f"plain_{seed}", 40, seed) for seed in range(2)]
    stopped = write_run(tmp_path / "plain_2", seed=2, lines=lines)
    page = report(*folders, stopped)
    assert page.rows[0][1] == "plain (2 runs)"
    assert "plain, plain_2 is unfinished: 20 of 40 iterations. It has no AP yet." in page.text
    alone = report(stopped)
    assert "No run has been evaluated yet." in alone.text and "No teacher is among the runs" in alone.text


def test_a_run_without_a_line_still_gives_a_page(report, tmp_path):
    page = report(write_run(tmp_path / "new", lines=[]))
    assert "is nothing logged" not in page.text and "has logged nothing" in page.text


def test_nan_is_said(report, tmp_path):
    lines = [
        {"iteration": 9, "loss_cls": 1.0},
        {"iteration": 19, "loss_cls": math.nan},
        {"iteration": 40, "loss_cls": 1.0, "bbox/AP": math.nan},
    ]
    page = report(write_run(tmp_path / "plain", lines=lines))
    assert "AP is NaN. Not one detection" in page.text and "not finite at some iteration: loss_cls" in page.text
    assert page.rows[1] == ["AP", "NaN"]


def test_an_evaluation_alone_is_said_to_be_one_and_has_its_figures(report, tmp_path):
    folder = write_run(tmp_path / "coco", lines=[])
    found = {"evaluated": "zoo/model.pth", "parameters": 2_000_000, "results": {"bbox/AP": 7 / 3, "bbox/AP-one": 1 / 7}}
    (folder / "evaluation.json").write_text(json.dumps(found))
    page = report(folder)
    assert "plain, coco is an evaluation of zoo/model.pth." in page.text and "unfinished" not in page.text
    assert page.rows[1] == ["AP", "2.33"] and "2.00 M" in page.text and "Nothing was logged twice" in page.text
    assert page.numbers["bbox/AP", str(folder)] == {(7 / 3, "2.33")}


def test_detections_that_are_being_written_do_not_end_the_report(report, tmp_path):
    run = write_run(tmp_path / "plain", 40)
    (run / "inference").mkdir()
    (run / "inference" / "coco_instances_results.json").write_text('[{"image_id": 1, ')
    assert "no detections are saved" in report(run).text


def test_a_detector_without_detections_is_drawn_and_said_to_have_none(report, tmp_path):
    entry = few_digits(tmp_path, 2)
    folder = write_run(tmp_path / "plain", lines=[{"iteration": 40, "bbox/AP": math.nan}])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["DATASETS"] = {"TEST": [entry[0]], "REGISTER": [entry]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "inference").mkdir()
    (folder / "inference" / "coco_instances_results.json").write_text("[]")
    page = report(folder)
    assert "Not one detection" in page.text and "No teacher is among the runs" in page.text
    counts = {row[0]: row[1] for row in page.rows if row[0] in ("right", "wrong", "missed")}
    assert counts["right"] == counts["wrong"] == "0" and int(counts["missed"]) > 2
    assert sum(image.startswith("data:image/jpeg") for image in page.images) == 2


def test_a_page_of_docs_is_drawn_from_the_results_that_were_kept(load_tool, three, tmp_path):
    tool = load_tool("report")
    seeds = [write_run(tmp_path / f"plain_{seed}", 40 + seed, seed) for seed in (1, 2)]
    tool.main([*map(str, [*three, *seeds]), "--json", str(tmp_path / "results" / "three.json")])
    asked = "<!-- drawn: {what: %s, from: results/three.json, of: bbox/AP, label: AP, baseline: plain} -->"
    page = tmp_path / "page.md"
    page.write_text("\n".join(["before", asked % "seeds", "old", "<!-- end -->", asked % "curves", "<!-- end -->"]))
    for _ in range(2):  # drawn anew, it stays as it is
        tool.main(["--page", str(page)])
        text = page.read_text()
        assert text.startswith("before\n<!-- drawn:") and "old" not in text and text.count("| plain") == 1
    row = next(line for line in text.splitlines() if line.startswith("| plain"))
    assert [cell.strip() for cell in row.split("|")[2:-2]] == ["41.14 ± 1.00", "40.14", "41.14", "42.14"]
    assert "+5.00" in next(line for line in text.splitlines() if line.startswith("| DKD"))
    assert "](figures/three_bbox_AP.svg)" in text
    assert (tmp_path / "figures" / "three_bbox_AP.svg").read_text().rstrip().endswith("</svg>")
    left_open = "\n".join([asked % "seeds", "the page's own words", asked % "curves", "<!-- end -->"])
    page.write_text(left_open)
    with pytest.raises(SystemExit, match=r"page\.md: a line .* has no <!-- end --> after it"):
        tool.main(["--page", str(page)])
    assert page.read_text() == left_open
    page.write_text("words alone\n")
    with pytest.raises(SystemExit, match=r"page\.md has no line <!-- drawn: .*: nothing to draw"):
        tool.main(["--page", str(page)])
    page.write_text((asked % "seeds").replace("of: bbox/AP", "of: total_loss") + "\n<!-- end -->")
    with pytest.raises(SystemExit, match=r"three\.json has no total_loss: results of evaluations are kept, no losses"):
        tool.main(["--page", str(page)])
    page.write_text("<!-- drawn: {what: table, from: results/three.json} -->\n<!-- end -->")
    with pytest.raises(SystemExit, match="what is 'table', expected seeds, curves, search or tries"):
        tool.main(["--page", str(page)])
    (tmp_path / "results" / "three.json").write_text("{")
    page.write_text(asked % "seeds" + "\n<!-- end -->")
    with pytest.raises(SystemExit, match=r"three\.json is no json that can be read"):
        tool.main(["--page", str(page)])


def test_an_unfinished_run_is_left_out_of_a_mean_of_docs_too(load_tool, tmp_path):
    runs = [write_run(tmp_path / f"plain_{seed}", 40 + seed, seed) for seed in range(2)]
    lines = [{"iteration": 9, "bbox/AP": 1.0}]
    tool, stopped = load_tool("report"), write_run(tmp_path / "plain_2", seed=2, lines=lines)
    tool.main([*map(str, [*runs, stopped]), "--json", str(tmp_path / "plain.json")])
    page = tmp_path / "page.md"
    page.write_text("<!-- drawn: {what: seeds, from: plain.json, of: bbox/AP, label: AP} -->\n<!-- end -->")
    tool.main(["--page", str(page)])
    row = next(line for line in page.read_text().splitlines() if line.startswith("| plain"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["40.64 ± 0.71", "40.14", "41.14"]


def test_test_sets_stand_in_their_order_in_the_config_and_the_average_behind():
    line = dict.fromkeys(("cinema/bbox/AP", "ema/my_val/bbox/AP", "extra/bbox/AP", "my_val/bbox/AP"), 1.0)
    run = Run(Path("a"), {"DATASETS": {"TEST": ["my_val", "extra", "cinema"]}}, [{"iteration": 1, **line}])
    assert evaluation_prefixes([run]) == ["my_val/bbox", "extra/bbox", "cinema/bbox", "ema/my_val/bbox"]


def test_a_file_among_the_folders_is_passed_over_and_a_training_without_an_evaluation_is_told(report, tmp_path):
    (tmp_path / "table.md").write_text("of tools/run_table.py")
    lines = [{"iteration": 39, "total_loss": 1.0}]
    page = report(write_run(tmp_path / "plain", lines=lines), tmp_path / "table.md")
    assert "plain was not evaluated at its end. It has no AP yet." in page.text


def test_a_teacher_alone_has_no_gap_to_itself(report, three):
    page = report(three[0])
    assert not any("gap" in cell for row in page.rows for cell in row) and "lowest AP of teacher" in page.text


def test_what_every_evaluator_measures_is_kept() -> None:
    line = {"sem_seg/mIoU": 1.0, "segm/AP": 2.0, "keypoints/AP50": 3.0, "panoptic_seg/PQ": 4.0, "my_val/bbox/AP": 5.0}
    assert kept({**line, "iteration": 9, "total_loss": 7.0, "sem_seg_head": 1.0}) == {**line, "iteration": 9}


def test_a_search_is_drawn_from_its_results(load_tool, tmp_path):
    tool, path = load_tool("search"), ROOT / "configs" / "Search" / "cls_digits.yaml"
    search = tool.Search(tool.read_table(path), tool.parse([str(path)]), tmp_path)

    def entry(training, curve: list[list[float]]) -> dict:
        what = {"training": training.key, "config": training.config, "overrides": list(search.words(training))}
        return {**what, "value": curve[-1][1], "curve": curve}

    trained = [entry(search.training("KD", "search", number, 100), [[40, 90.0 + number]]) for number in range(2)]
    trained += [entry(search.training("KD", "test", 1, seed), [[20, 50.0], [40, 94.0 + seed]]) for seed in range(2)]
    (tmp_path / "cls.json").write_text(json.dumps({"table": path.name, "trainings": trained}))
    asked = "<!-- drawn: {what: %s, from: cls.json, of: val/top1} -->\n<!-- end -->\n"
    (tmp_path / "page.md").write_text("".join(asked % what for what in ("search", "seeds", "curves")))
    load_tool("report").main(["--page", str(tmp_path / "page.md")])
    rows = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| KD")]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells[0][:5] == ["KD", "94.50 ± 0.71", "2", "91.00", "2"] and "SOLVER.BASE_LR" in cells[0][-1]
    assert cells[1] == ["KD", "94.50 ± 0.71", "94.00", "95.00"]
    assert (tmp_path / "figures" / "cls_val_top1.svg").is_file()
    tries = "<!-- drawn: {what: tries, from: cls.json, by: %s} -->\n<!-- end -->\n"
    (tmp_path / "page.md").write_text(tries % "SOLVER.BASE_LR")
    load_tool("report").main(["--page", str(tmp_path / "page.md")])
    head, row = ((tmp_path / "page.md").read_text().splitlines()[line] for line in (1, 4))
    assert "search val/top1" in head and "SOLVER.BASE_LR 0.05" in head
    assert sorted(cell.strip() for cell in row.split("|")[2:-1] if cell.strip() != "–") == ["**91.00**", "90.00"]
    (tmp_path / "page.md").write_text("<!-- drawn: {what: tries, from: cls.json} -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="tries needs by, a key of the grids"):
        load_tool("report").main(["--page", str(tmp_path / "page.md")])
    (tmp_path / "page.md").write_text("<!-- drawn: {what: seeds, from: cls.json} -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="seeds needs of, a key of metrics"):
        load_tool("report").main(["--page", str(tmp_path / "page.md")])
    (tmp_path / "page.md").write_text(tries % "SOLVER.RATE")
    with pytest.raises(SystemExit, match=r"page\.md: .*: no grid of .*cls_digits.yaml has SOLVER.RATE"):
        load_tool("report").main(["--page", str(tmp_path / "page.md")])
    trained[0]["overrides"] += ["SOLVER.BASE_LR", "7"]
    (tmp_path / "cls.json").write_text(json.dumps({"table": path.name, "trainings": trained}))
    with pytest.raises(SystemExit, match="search/KD/try0_seed100 was trained with other options than the table has"):
        load_tool("report").main(["--page", str(tmp_path / "page.md")])


def test_the_results_in_docs_are_what_their_json_draws(load_tool, tmp_path):
    docs = ROOT / "docs"
    shutil.copytree(docs / "results", tmp_path / "results")
    shutil.copy(docs / "results.md", tmp_path)
    load_tool("report").main(["--page", str(tmp_path / "results.md")])
    assert (tmp_path / "results.md").read_text() == (docs / "results.md").read_text()


def test_a_line_that_is_being_written_is_no_obstacle(report, three):
    with open(three[1] / "metrics.json", "a") as file:
        file.write('{"iteration": 41, "bbox/AP": 1')
    assert report(*three).rows[1] == ["AP", "60.14", "40.14", "45.14"]


def test_command_versions_seed_and_commit_are_named(report, tmp_path):
    info = {"command": "python tools/train_net.py --x", "commit": "0123abc", "versions": {"torch": "2.9"}}
    text = report(write_run(tmp_path / "plain", seed=7, info=info)).text
    assert all(word in text for word in ("python tools/train_net.py --x", "0123abc", "torch 2.9", "seed 7"))


def test_of_an_older_run_the_log_says_it(report, tmp_path):
    folder = write_run(tmp_path / "plain")
    log = "Python      3.11.7 (main)\nPyTorch     2.9.1+cpu\nCommand line arguments: Space(a=1)\n"
    (folder / "log.txt").write_text(log)
    text = report(folder).text
    assert "Space(a=1)" in text and "python 3.11.7, torch 2.9.1+cpu" in text and "not recorded" in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "there is no folder .*nowhere"),
        (lambda folder: folder, "is no OUTPUT_DIR of a training: it has no config.yaml"),
    ],
    ids=["no folder", "another folder"],
)
def test_what_is_no_training_is_said_in_one_line(report, tmp_path, make, message):
    with pytest.raises(SystemExit, match=f"^report: .*{message}"):
        report(make(tmp_path))
