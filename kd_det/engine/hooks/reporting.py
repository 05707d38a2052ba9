"""The training hook for readers: scalars, run.json at the start; report.html and pictures at every evaluation."""

import io
import logging
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter
from PIL import Image

from kd_core.utils.latency import clock
from kd_core.utils.report.live import logged, status_line, write_live_report
from kd_core.utils.run_info import write_run_info

logger = logging.getLogger(__name__)


class Report(hooks.PeriodicWriter):
    """detectron2's hook of the writers, on the main process; it reads the metrics.json that they write, and TensorBoard
    gets the report's pictures.
    """

    def __init__(self, cfg: CfgNode, writers: Sequence[EventWriter], period: int) -> None:
        super().__init__(writers, period)
        self.cfg = cfg

    def before_train(self) -> None:
        self.seen = getattr(self.trainer, "_last_eval_results", None)
        self.started = time.perf_counter()
        write_run_info(
            self.cfg.OUTPUT_DIR,
            self.trainer.start_iter,
            seed=self.cfg.SEED,
            device=self.cfg.MODEL.DEVICE,
            world_size=comm.get_world_size(),
            max_iter=self.trainer.max_iter,
            parameters=sum(p.numel() for p in self.trainer.student_parameters()),
        )

    def after_step(self) -> None:
        super().after_step()
        done = self.trainer.iter + 1
        if done == self.trainer.start_iter + self._period:
            each = (time.perf_counter() - self.started) / self._period
            left = clock(each * (self.trainer.max_iter - done))
            logger.info("About %s to go at %.2f s per iteration, evaluations not counted", left, each)
        if done % self._period == 0 and done < self.trainer.max_iter:
            results = getattr(self.trainer, "_last_eval_results", None)
            if results is not self.seen:
                self.seen = results
                self.write(done, running=True)

    def after_train(self) -> None:
        # The page reads the last evaluation's results from metrics.json. Not the console's writer: written twice in an
        # iteration, detectron2's divides by the time between.
        for writer in self._writers:
            if isinstance(writer, JSONWriter):
                writer.write()
        self.write(self.trainer.iter, running=False)
        super().after_train()  # with the last pictures

    def write(self, iteration: int, running: bool) -> None:
        """The page, where REPORT.ENABLED asks for it, and the status line."""
        # with pycocotools and matplotlib: where a report is written, and not in every process
        from kd_det.evaluation.html_report import detector_page, evaluation_prefixes, main_key, read_detector_run

        if self.cfg.REPORT.ENABLED:
            make_page = partial(detector_page, logits=False)
            page = write_live_report(self.cfg.OUTPUT_DIR, read_detector_run, make_page, running)
            if page and any(isinstance(writer, TensorboardXWriter) for writer in self._writers):
                for name, figure in page.photographs().items():
                    pixels = np.array(Image.open(io.BytesIO(figure.content)))
                    self.trainer.storage.put_image(name, torch.from_numpy(pixels).permute(2, 0, 1))
        run = logged(self.cfg.OUTPUT_DIR)
        run.config = {"DATASETS": {"TEST": list(self.cfg.DATASETS.TEST)}}  # in this order
        prefixes = evaluation_prefixes([run])
        key = main_key(prefixes[0]) if prefixes else "bbox/AP"
        values = list(zip(*run.series(key), strict=True)) if prefixes else []
        logger.info(status_line(iteration, self.trainer.max_iter, key.rpartition("/")[2], values))
