"""Bad clips on record: one line each, and a stop where there are too many of them."""

import json
import logging
import math
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from dit_video.data.shards import BadDataError, ClipRecord

BAD_IN_A_ROW = 16
BAD_WINDOW = 1000
"""Clips of the stream, besides all since the start, over which the share of bad ones is judged: data may turn bad late."""
CHANCE = 1e-9
"""A share is too large where a set that has just the largest share allowed would show as many bad clips so rarely."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadClip:
    """A clip that could not be used."""

    record: ClipRecord
    reason: str


class Ledger:
    """Writes one JSON line a bad clip (key, shard, offset, reason), and raises BadDataError when there are too many of them.

    In a stream that is shuffled so are many in a row, whatever share is allowed. Of clips that are read in order bad ones may be
    neighbours, or come up together when what was cut off goes on: there they are counted, and compared with the share of all.
    """

    def __init__(self, num_clips: int, max_bad_fraction: float, path: Path | None, shuffled: bool = True) -> None:
        self.num_clips, self.max_bad_fraction, self.path, self.shuffled = num_clips, max_bad_fraction, path, shuffled
        self.window: deque[tuple[str, str] | None] = deque(maxlen=BAD_WINDOW)
        self.seen = self.in_a_row = 0
        self.bad: set[tuple[str, str]] = set()  # since the start of this program
        self.known = _listed(path) if path is not None and path.is_file() else set()

    def account(self, bad: BadClip | None) -> None:
        """Takes note of the next clip of the stream: a bad one, or one that was fine."""
        self.window.append((str(bad.record.shard), bad.record.key) if bad else None)
        self.seen, self.in_a_row = self.seen + 1, 0 if bad is None else self.in_a_row + 1
        if bad is None:
            return
        self._write(bad)
        self.bad.add((str(bad.record.shard), bad.record.key))
        count, seen = self._too_many()
        if (self.shuffled and self.in_a_row >= BAD_IN_A_ROW) or seen:
            count, seen = (count, seen) if seen else (self.in_a_row, self.in_a_row)
            raise BadDataError(
                f"{bad.record.shard}: {count} of the last {seen} clips are bad ({self.in_a_row} in a row); the last is "
                f"{bad.record.key}: {bad.reason}; mend data.shards"
                + (f" (all are listed in {self.path})" if self.path else "")
                + f" or raise data.max_bad_fraction={self.max_bad_fraction:g}"
            )

    def _too_many(self) -> tuple[int, int]:
        """The bad clips, each counted once, and the clips among which they are too many; 0 where they are not."""
        distinct = min(self.seen, self.num_clips)  # so many clips at the most have been met
        allowed = self.max_bad_fraction * self.num_clips
        if not self.shuffled:
            too_many = len(self.bad) > allowed and len(self.bad) >= min(BAD_IN_A_ROW, self.num_clips)
            return (len(self.bad), distinct) if too_many else (0, 0)
        if distinct == self.num_clips and len(self.bad) > (
            max(1, allowed) if allowed else 0
        ):  # after a pass nothing is left to chance
            return len(self.bad), self.num_clips
        recent = len({*self.window} - {None})
        for count, seen in ((len(self.bad), distinct), (recent, min(len(self.window), self.num_clips))):
            if tail(count, seen, self.max_bad_fraction) < CHANCE:
                return count, seen
        return 0, 0

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
        with open(self.path, "a+b") as file:
            whole = file.tell() == 0 or file.seek(-1, os.SEEK_END) >= 0 and file.read(1) == b"\n"
            file.write((b"" if whole else b"\n") + json.dumps(line).encode() + b"\n")  # a kill may have torn the line before


def _listed(path: Path) -> set[tuple[str, str]]:
    """Shard and key of the clips in a ledger; a line that is torn is passed over."""
    found = set()
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            found.add((line["shard"], line["key"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def tail(count: int, total: int, share: float) -> float:
    """The probability of `count` or more among `total`, each with probability `share` (the upper tail of the binomial distribution)."""
    if count <= share * total or share >= 1:
        return 1.0
    if share <= 0:
        return 0.0
    logs = [
        math.lgamma(total + 1)
        - math.lgamma(k + 1)
        - math.lgamma(total - k + 1)
        + k * math.log(share)
        + (total - k) * math.log1p(-share)
        for k in range(count, min(total, count + 200) + 1)  # the terms fall from the first on, and soon to nothing
    ]
    return sum(math.exp(each) for each in logs)
