"""A reader of clips that does harm at one of them; worker processes import it, so there is no torch in it."""

import ctypes
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_video.data.reader import ClipReader, Job


@dataclass(frozen=True)
class HarmfulReader(ClipReader):
    """Reads as ClipReader does, but for the clip of one name."""

    name: str = ""
    deed: str = ""

    def __call__(self, job: Job | None, out: np.ndarray) -> Any:
        if job is not None and job.record.name == self.name:
            harm(self.deed)
        return super().__call__(job, out)


def harm(deed: str) -> None:
    """What broken decoders do."""
    if deed == "hang":
        ctypes.PyDLL(None).pause()  # with the interpreter locked
    elif deed == "segmentation fault":
        ctypes.string_at(0)
    elif deed == "abort":
        os.abort()
    elif deed == "leak":
        kept = [np.ones(2**26, np.uint8) for _ in range(16)]  # 1 GiB
        time.sleep(900)
        del kept
