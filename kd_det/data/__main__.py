"""python -m kd_det.data: write the built-in data set now rather than at the first training."""

from kd_det.data.builtin import main

main()
