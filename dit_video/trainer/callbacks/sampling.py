"""Samples from fixed prompts and seeds while training goes on."""

from collections.abc import Callable, Sequence
from pathlib import Path

import lightning as L
import numpy as np

from dit_video.data.video_file import contact_sheet, write_mp4
from dit_video.sampler.generate import Request
from dit_video.trainer.callbacks.every import Aside
from dit_video.trainer.module import VideoDiffusion
from dit_video.trainer.record import Mirror

Generate = Callable[[VideoDiffusion, list[Request]], list[np.ndarray]]


class Sampling(Aside):
    """Writes samples/clips-<number>/<prompt's number>.mp4 and a contact sheet, from the averaged weights."""

    name = "sampling"

    def __init__(self, every_clips: int, folder: Path, requests: Sequence[Request], generate: Generate) -> None:
        super().__init__(every_clips)
        self.folder, self.requests, self.generate = folder, list(requests), generate

    def look(self, trainer: L.Trainer, module: VideoDiffusion) -> None:
        if not self.requests:
            return
        videos = self.generate(module, self.requests)  # by all ranks, each of which may hold a part of the weights
        if not trainer.is_global_zero:
            return
        folder = self.folder / f"clips-{module.clips:09d}"
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{number:03d}.mp4" for number in range(len(videos))]
        for path, video, request in zip(paths, videos, self.requests, strict=True):
            write_mp4(path, video, request.fps)
        captions = [request.prompt for request in self.requests]
        contact_sheet(videos, captions, folder / "contact_sheet.png")
        for logger in trainer.loggers:
            if isinstance(logger, Mirror):
                logger.log_video("samples", [str(path) for path in paths], captions, module.steps)
