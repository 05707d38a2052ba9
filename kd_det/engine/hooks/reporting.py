"""Training hooks for readers: run.json at the start, report.html and a status line at every evaluation."""

import logging
import time

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from kd_core.utils.report.live import logged, status_line, write_live_report
from kd_core.utils.report.sections import seconds_text
from kd_core.utils.run_info import write_run_info

logger = logging.getLogger(__name__)
WRITTEN_EVERY = 20  # iterations between two lines of metrics.json


class Report(HookBase):
    """On the main process; must come after the writers, whose metrics.json it reads."""

    def __init__(self, cfg: CfgNode) -> None:
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
            parameters=sum(p.numel() for p in self.trainer.checkpointer.model.parameters()),
        )

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.start_iter + WRITTEN_EVERY:
            each = (time.perf_counter() - self.started) / WRITTEN_EVERY
            left = seconds_text(each * (self.trainer.max_iter - done))
            logger.info("About %s to go at %.2f s per iteration, evaluations not counted", left, each)
        if done % WRITTEN_EVERY == 0 and done < self.trainer.max_iter:
            results = getattr(self.trainer, "_last_eval_results", None)
            if results is not self.seen:
                self.seen = results
                self.write(done, running=True)

    def after_train(self) -> None:
        self.write(self.trainer.iter, running=False)

    def write(self, iteration: int, running: bool) -> None:
        """The page, where REPORT.ENABLED asks for it, and the status line."""
        # with pycocotools and matplotlib: where a report is written, and not in every process
        from kd_det.evaluation.html_report import detector_page, evaluation_prefixes, read_detector_run

        if self.cfg.REPORT.ENABLED:
            write_live_report(self.cfg.OUTPUT_DIR, read_detector_run, detector_page, running)
        run = logged(self.cfg.OUTPUT_DIR)
        prefixes = evaluation_prefixes([run])
        values = list(zip(*run.series(f"{prefixes[0]}/AP"), strict=True)) if prefixes else []
        logger.info(status_line(iteration, self.trainer.max_iter, "AP", values))
