"""Bad clips on record: one line each, and a stop where there are too many of them."""

import json
import logging
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from dit_video.data.shards import BadDataError, ClipRecord

BAD_IN_A_ROW = 16
BAD_WINDOW = (100, 1000)
"""The share of bad clips, each counted once, is judged over as many clips as the data has, but at least and at most so many."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadClip:
    """A clip that could not be used."""

    record: ClipRecord
    reason: str


class Ledger:
    """Writes one JSON line a bad clip (key, shard, offset, reason), and raises BadDataError when there are too many of them."""

    def __init__(self, num_clips: int, max_bad_fraction: float, path: Path | None) -> None:
        self.max_bad_fraction, self.path = max_bad_fraction, path
        least, most = BAD_WINDOW
        self.window: deque[tuple[str, str] | None] = deque(maxlen=max(least, min(most, num_clips)))
        self.in_a_row = 0
        self.known: set[tuple[str, str]] = set()
        if path is not None and path.is_file():
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            self.known = {(line["shard"], line["key"]) for line in lines}

    def account(self, bad: BadClip | None) -> None:
        """Takes note of the next clip of the stream: a bad one, or one that was fine."""
        self.window.append((str(bad.record.shard), bad.record.key) if bad else None)
        self.in_a_row = 0 if bad is None else self.in_a_row + 1
        if bad is None:
            return
        self._write(bad)
        count, limit = len({*self.window} - {None}), self.max_bad_fraction * (self.window.maxlen or 0)
        if self.in_a_row >= BAD_IN_A_ROW or count > limit:
            raise BadDataError(
                f"{bad.record.shard}: {count} of the last {len(self.window)} clips are bad ({self.in_a_row} in a row); the last is "
                f"{bad.record.key}: {bad.reason}; mend data.shards"
                + (f" (all are listed in {self.path})" if self.path else "")
                + f" or raise data.max_bad_fraction={self.max_bad_fraction:g}"
            )

    def _write(self, bad: BadClip) -> None:
        record = bad.record
        if (str(record.shard), record.key) in self.known:
            return
        self.known.add((str(record.shard), record.key))
        log.warning("%s is left out: %s", record.name, bad.reason)
        if self.path is None:
            return
        offset = min((member.offset for member in record.members.values()), default=0)
        line = {"key": record.key, "shard": str(record.shard), "offset": offset, "reason": bad.reason}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
