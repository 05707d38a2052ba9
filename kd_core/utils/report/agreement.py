"""Agreement of student and teacher logits by class."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_core.utils.report.tables import Cell, Number, Table


def by_class(values: Tensor, target: Tensor, classes: int) -> list[float]:
    """Mean of the rows' values within each class of `target`; NaN for a class without a row."""
    return [float(values[target == index].double().mean()) for index in range(classes)]


def agreement_table(
    teacher_logits: Tensor, student_logits: Tensor, target: Tensor, names: Sequence[str], student: str, rows: str
) -> Table:
    """How often both predict the same class and the right one, and the KL divergence of their outputs, by class.

    Args:
        teacher_logits, student_logits: (N, C).
        target: (N,), below the number of `names`.
        student: title of its method.
        rows: what a row is: "images", "objects' boxes".
    """
    predicted, own = teacher_logits.argmax(1), student_logits.argmax(1)
    log_teacher, log_student = (logits.double().log_softmax(1) for logits in (teacher_logits, student_logits))
    divergence = ((log_teacher - log_student) * log_teacher.exp()).sum(1)
    shares = [100 * (predicted == own), 100 * (predicted == target), 100 * (own == target)]
    columns = [by_class(values, target, len(names)) for values in (*shares, divergence)]
    counts = torch.bincount(target, minlength=len(names)).tolist()
    lines: list[tuple[float, str, list[Cell]]] = []
    for name, count, same, teacher_right, student_right, nats in zip(names, counts, *columns, strict=True):
        if count:
            cells = [percent(same), percent(teacher_right), percent(student_right), Number(nats, f"{nats:.3f}")]
            lines.append((same, name, [[Number(count, str(count))], *([cell] for cell in cells)]))
    lines.sort(key=lambda line: line[0])
    header = ["class", rows, "same class, %", "teacher right, %", f"{student} right, %", "KL"]
    caption = (
        f"Logits of teacher and {student} on the same {rows}: how often their largest is of the same class, and "
        f"KL(teacher ‖ {student}) at temperature 1 in nats. The class with least agreement first."
    )
    return Table(header, [(name, cells) for _, name, cells in lines], caption, paged=10)


def percent(value: float, sign: bool = False) -> Number:
    return Number(value, "NaN" if value != value else f"{value:+.2f}" if sign else f"{value:.2f}")
