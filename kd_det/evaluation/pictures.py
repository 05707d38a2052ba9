"""Pictures of a report: the images on which student and teacher differ most, and how often they agree by class."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from PIL import Image
from pycocotools.coco import COCO

from kd_core.utils.errors import UserError
from kd_core.utils.report.agreement import agreement_table
from kd_core.utils.report.page import Figure, Gallery, Section
from kd_core.utils.report.runs import Run, lookup
from kd_core.utils.report.tables import Cell, Number, Table
from kd_det.data import register_datasets
from kd_det.evaluation.drawing import Canvas
from kd_det.evaluation.evaluator import DETECTIONS, complete
from kd_det.evaluation.logits import logits_on_objects, objects_of
from kd_det.evaluation.matching import Match, TestSet, match_detections

IMAGES = 6  # pictures
THRESHOLD = 0.5  # lowest score that counts
COLUMNS = 4  # models beside each other
JPEG_WIDTH, JPEG_QUALITY = 640, 80


def detection_sections(groups: dict[str, list[Run]], student: str, logits: bool) -> list[Section]:
    """What each method's first run finds, on the images on which teacher and `student` differ most, and by class how
    far these two agree.

    Without a teacher: the images with most errors of `student`.

    Args:
        logits: compare the logits of teacher and student, too, which takes minutes on a CPU.
    """
    section, agreement = Section("Pictures"), Section("Agreement of teacher and student")
    shown, detections, missing = {}, {}, []
    for title, runs in groups.items():
        for run in runs:
            if (found := read_detections(run)) is not None:
                shown[title], detections[title] = run, found
                break
        else:
            path = runs[0].folder / DETECTIONS
            missing.append(f"{title}: no detections are saved: {path} is written by an evaluation, whole at its end.")
    judged = shown.get(student) or next(iter(shown.values()), None)
    for title in [title for title, run in shown.items() if last_test_set(run)[1] != last_test_set(judged)[1]]:
        missing.append(f"{title}: it was evaluated on other images, {last_test_set(shown.pop(title))[0]}.")
    section.text += missing
    test_set = open_test_set(judged) if judged else None
    if test_set is None:
        section.text += ["The test set is not on this machine, so nothing can be drawn."] if shown else []
        return [section]
    first = [title for title in shown if shown[title].role == "teacher"][:1] + [student] * (student in shown)
    others = sorted(shown, key=lambda title: shown[title].role == "student")
    titles = list(dict.fromkeys([*first, *others]))[:COLUMNS]
    matches = {t: match_detections(test_set.truth, detections[t], test_set.images) for t in titles}
    teacher = next((title for title in titles if shown[title].role == "teacher"), None)
    student = student if student in matches else titles[-1]
    section.blocks.append(counts_table(matches, len(test_set.images)))
    if teacher and teacher != student:
        agreement.blocks.append(found_table(matches[teacher], matches[student], test_set, student))
        if logits:
            add_logits(agreement, shown[teacher], shown[student], test_set)
    section.text.append(legend(teacher if teacher != student else None, student))
    for image in most_telling(matches, teacher, student):
        gallery = draw_image(test_set, image, {title: matches[title][image] for title in titles})
        section.blocks += [gallery] if gallery else []
    return [section, agreement] if agreement.blocks else [section]


def add_logits(section: Section, teacher: Run, student: Run, test_set: TestSet) -> None:
    """Add the agreement of logits on the objects' boxes, or why there is none."""
    objects = objects_of(test_set)
    try:
        rows = [logits_on_objects(run, objects) for run in (teacher, student)]
        if rows[0].shape != rows[1].shape:
            raise UserError("they are of other classes")
        target = torch.cat([classes for *_, classes in objects])
        section.blocks.append(agreement_table(*rows, target, test_set.names, student.title, "objects"))
    except (UserError, OSError) as error:
        section.text.append(f"The logits are not compared: {error}")


def legend(teacher: str | None, student: str) -> str:
    which = f"the images on which teacher and {student} differ most" if teacher else f"{student}'s worst images"
    return (
        f"Shown: {which}. Solid: right. Vermilion with an x: wrong. Dashed: missed. Detections with a score above "
        f"{THRESHOLD:g}, matched as COCO's evaluation does at IoU .5; crowds are left out. A class has one colour."
    )


def last_test_set(run: Run) -> tuple[str, list[str]]:
    """The last data set of DATASETS.TEST, whose detections an evaluation leaves ("" for none), and what identifies it:
    the paths of its DATASETS.REGISTER, or the name of one that detectron2 or this package registers.
    """
    name = next(reversed(lookup(run.config, "DATASETS", "TEST", default=[])), "")
    entries = lookup(run.config, "DATASETS", "REGISTER", default=[])
    return name, next((list(paths) for own, *paths in entries if own == name), [name])


def open_test_set(run: Run) -> TestSet | None:
    """The images and objects of a run's last test set; None where they are not here."""
    name, _ = last_test_set(run)
    if not name:
        return None
    entries = lookup(run.config, "DATASETS", "REGISTER", default=[])
    register_datasets(CfgNode({"DATASETS": {"REGISTER": entries, "REGISTER_SEM_SEG": []}}))
    metadata = MetadataCatalog.get(name)
    path, root = metadata.get("json_file", ""), metadata.get("image_root", "")
    if not path or not Path(path).is_file():
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
    complete(truth)
    return TestSet(truth, Path(root))


def read_detections(run: Run) -> list[dict[str, Any]] | None:
    """What a run's last evaluation has found, with a score above `THRESHOLD`.

    None where there is no whole file of it: detectron2 writes in place. COCO's has half a million entries.
    """
    try:
        found = json.loads((run.folder / DETECTIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return [one for one in found if one["score"] > THRESHOLD]


def most_telling(matches: dict[str, dict[int, Match]], teacher: str | None, student: str) -> list[int]:
    """The images with the most differences between teacher and student; without a teacher, with the most errors."""

    def errors(image: int) -> int:
        own = matches[student][image]
        if teacher is None or teacher == student:
            return len(own.wrong) + len(own.missed)
        other = matches[teacher][image]
        return len(own.found ^ other.found) + abs(len(own.wrong) - len(other.wrong))

    ranked = sorted(matches[student], key=lambda image: (-errors(image), image))
    return [image for image in ranked[:IMAGES] if errors(image)]


def counts_table(matches: dict[str, dict[int, Match]], images: int) -> Table:
    """Right, wrong and missed of every model, in all images that were matched."""
    rows: list[tuple[str, list[Cell]]] = []
    for name in ("right", "wrong", "missed"):
        counts = [sum(len(getattr(match, name)) for match in of.values()) for of in matches.values()]
        rows.append((name, [[Number(count, str(count))] for count in counts]))
    return Table(["", *matches], rows, f"Boxes in {images} images, with a score above {THRESHOLD:g}.")


def found_table(
    teacher: dict[int, Match], student: dict[int, Match], test_set: TestSet, title: str
) -> Table:
    """By class: on how many objects teacher and student agree, and which of them finds the others."""
    rows = []
    for number in sorted(test_set.truth.cats):
        objects = test_set.truth.getAnnIds(imgIds=test_set.images, catIds=[number], iscrowd=False)
        found = [found_in(of).intersection(objects) for of in (teacher, student)]
        if not objects:
            continue
        apart = found[0] ^ found[1]
        share = 100 * (1 - len(apart) / len(objects))
        counts = [len(objects), len(found[0] & found[1]), len(found[0] - found[1]), len(found[1] - found[0])]
        cells = [[Number(share, f"{share:.1f} %")], *([Number(count, str(count))] for count in counts)]
        rows.append((share, test_set.truth.cats[number]["name"], cells))
    rows.sort(key=lambda row: row[0])
    header = ["class", "agree", "objects", "both find", "teacher only", f"{title} only"]
    caption = "Objects that both find or both miss, the class with least agreement first."
    return Table(header, [(name, cells) for _, name, cells in rows], caption, paged=10)


def found_in(matches: dict[int, Match]) -> set[int]:
    """Ids of all annotations that a model finds."""
    return set().union(*(match.found for match in matches.values()))


def draw_image(test_set: TestSet, image: int, matches: dict[str, Match]) -> Gallery | None:
    """Every model's matches on one image; None where the image is not there."""
    name = test_set.truth.imgs[image]["file_name"]
    path = test_set.folder / name
    if not path.is_file():
        return None
    rgb = read_image(str(path), "RGB")  # upright, as the detector saw it
    figures = []
    for title, match in matches.items():
        picture = Canvas(rgb, test_set.names, sorted(test_set.truth.cats)).draw_match(match)
        figures.append(Figure(title, jpeg(picture), "image/jpeg", f"{title} on {name}: {match}", str(match)))
    return Gallery(figures, name, wide=True)


def jpeg(picture: Image.Image) -> bytes:
    picture.thumbnail((JPEG_WIDTH, 4 * JPEG_WIDTH))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
