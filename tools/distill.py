#!/usr/bin/env python
"""From your trained detector to a smaller one, in one command.

    tools/distill.py --teacher my.yaml my.pth --student resnet18 --output out/r18
    tools/distill.py --teacher my.yaml my.pth --student mobilenetv2_100 --width 0.5 --scale 0.75 --output out/mv2
    tools/distill.py --teacher my.yaml my.pth --student tf_efficientnet_lite0 --voc VOC_FOLDER --baseline --output out

The teacher is a detectron2 config (a yaml, or a LazyConfig .py, which is code and is run) and its weights. The
student's config is derived from it: classes, data, heads, anchors and schedule are the teacher's, batch and learning
rate follow the number of GPUs by the linear rule, and the FPN gets the norm that its backbone's maps need. It is
written to OUTPUT/distill.yaml and is yours to edit. The command first reports what will come out and how long it takes.
Then it evaluates the teacher, trains, evaluates and exports the student (plain detectron2, TorchScript), and prints a
table. If it is interrupted, the same command resumes.
"""

from collections.abc import Sequence

from kd_core.utils.errors import exit_on_user_error
from kd_det.engine.distill import distill, parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser(__doc__).parse_intermixed_args(arguments)
    exit_on_user_error("distill", lambda: distill(args), "interrupted; the same command resumes")


if __name__ == "__main__":
    main()
