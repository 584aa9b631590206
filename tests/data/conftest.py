"""What the tests of the data room share."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dit_video.data.shards import write_shard

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by file, so clip_files has no package to be found in
from clip_files import clip_sample  # noqa: E402


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., str]:
    """Writes numbered clips over two shards, with some samples changed, and returns the pattern that names them."""

    def make(
        num_clips: int = 12, num_frames: int = 3, change: Callable[[int, dict], dict] = lambda number, sample: sample
    ) -> str:
        samples = [change(number, clip_sample(number, num_frames)) for number in range(num_clips)]
        write_shard(tmp_path / "0.tar", samples[: num_clips // 2])
        write_shard(tmp_path / "1.tar", samples[num_clips // 2 :])
        return str(tmp_path / "{0..1}.tar")

    return make
