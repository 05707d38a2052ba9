"""A distillation task: the student, the teacher and its cached logits, and the losses between them."""

from kd_cls.task.distillation import DistillationTask
from kd_cls.task.logit_cache import LogitCache
from kd_cls.task.student import Student
from kd_cls.task.teacher import Teacher, build_teacher

__all__ = ["DistillationTask", "LogitCache", "Student", "Teacher", "build_teacher"]
