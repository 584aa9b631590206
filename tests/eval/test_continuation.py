import numpy as np
import pytest

from dit_video.data.shards import write_shard
from dit_video.data.video_file import encode_mp4
from dit_video.eval.continuation import ContinuationSuite, Fidelity, GivenFrames, MotionAmount, frozen, linear_flow, motion, psnr
from dit_video.eval.judge import evaluate
from dit_video.sampler.generate import Request

pytest.importorskip("cv2", reason="the data extra is not installed")

SIZE = {"num_frames": 9, "height": 32, "width": 48, "fps": 8.0}


def moving_texture(seed: int, num_frames: int = 9, height: int = 32, width: int = 48, speed: int = 1) -> np.ndarray:
    """A smooth random picture that moves `speed` pixels a frame to the left."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, : width + speed * num_frames]
    waves = sum(
        np.sin(2 * np.pi * (y * rng.uniform(-0.1, 0.1) + x * rng.uniform(-0.1, 0.1)) + rng.uniform(0, 6, 3)[:, None, None])
        for _ in range(8)
    )
    picture = (127.5 + 30 * waves).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    return np.stack([picture[:, speed * frame : speed * frame + width] for frame in range(num_frames)])


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    path = tmp_path_factory.mktemp("footage") / "00000.tar"
    samples = [{"__key__": f"{n:03d}", "mp4": encode_mp4(moving_texture(n, 16), 8), "txt": f"texture {n}"} for n in range(12)]
    samples.append({"__key__": "broken", "mp4": b"this is no video", "txt": "nothing"})
    samples.append({"__key__": "mute", "mp4": encode_mp4(moving_texture(50), 8)})
    write_shard(path, samples)
    return str(path)


def suite(shard, num_given, count=99):
    return ContinuationSuite(shard, count=count, seed=0, num_given=num_given, **SIZE)


def measure(shard, generate, num_given=3):
    metrics = {"given": GivenFrames(), "motion": MotionAmount(), "fidelity": Fidelity()}
    return evaluate({"real": suite(shard, num_given)}, metrics, generate, 5)


def test_clips_are_read_with_their_captions_and_broken_ones_left_out(shard, caplog):
    asked = suite(shard, 3)
    requests = asked.requests()
    assert len(requests) == 13 and "00000.tar:broken is left out" in caplog.text and "13 real clips" in asked.protocol
    assert {request.prompt for request in requests} == {f"texture {n}" for n in range(12)} | {""}
    for request in requests:
        assert request.task == "extend" and request.real.shape == (9, 32, 48, 3)
        np.testing.assert_array_equal(request.given, request.real[:3])
    again = suite(shard, 1, count=4).requests()
    assert [request.task for request in again] == ["image_to_video"] * 4
    assert [request.prompt for request in again] == [request.prompt for request in requests[:4]]


def test_the_truth_is_perfect(shard):
    found = measure(shard, lambda requests: [request.real for request in requests]).metrics
    assert found["given.real.exact"].value == 1 and found["given.real.largest_difference"].value == 0
    assert found["motion.real.ratio"].value == found["motion.real.ratio"].low == 1
    assert found["fidelity.real.model"].value == pytest.approx(58.92, abs=0.01)


def test_a_frozen_clip_is_called_frozen(shard):
    found = measure(shard, lambda requests: [frozen(request.given, 9) for request in requests]).metrics
    assert found["motion.real.ratio"].high < 0.05
    assert found["fidelity.real.over_frozen"].value == 0 == found["fidelity.real.over_frozen"].high
    assert found["fidelity.real.model"] == found["fidelity.real.frozen"]


def test_flow_baseline_goes_on_as_it_moved(shard):
    found = measure(shard, lambda requests: [linear_flow(request.given, 9) for request in requests]).metrics
    assert found["fidelity.real.linear_flow"].low > found["fidelity.real.frozen"].high + 3
    assert found["fidelity.real.over_linear_flow"].value == 0 and 0.5 < found["motion.real.ratio"].value < 1.5
    one = measure(shard, lambda requests: [request.real for request in requests], num_given=1).metrics
    assert one["fidelity.real.linear_flow"] == one["fidelity.real.frozen"]
    assert "equals frozen where only one is given" in Fidelity.protocol


def test_one_changed_value_is_not_exact(shard):
    def almost(requests):
        videos = [request.real.copy() for request in requests]
        for video in videos:
            video[0, 0, 0, 0] ^= 1
        return videos

    found = measure(shard, almost).metrics
    assert found["given.real.exact"].value == 0 and found["given.real.largest_difference"].value == 1


@pytest.mark.parametrize("speed", [0, 1, 2])
def test_motion_is_in_pixels_a_frame(speed):
    assert motion(moving_texture(3, speed=speed, height=64, width=64)) == pytest.approx(speed, abs=0.15 * speed + 0.01)


def test_psnr_is_the_textbook_one():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(black, black + 255) == pytest.approx(0)
    assert psnr(black, black + 10) == pytest.approx(20 * np.log10(255 / 10))


def test_metrics_refuse_what_they_cannot_judge(shard):
    world = [Request("a red circle", 0, 9, 32, 48, 8.0)]
    between = [Request("a red circle", 0, 9, 32, 48, 8.0, task="in_between", given=np.zeros((2, 32, 48, 3), np.uint8))]
    assert not any(metric.suits(world) for metric in (GivenFrames(), MotionAmount(), Fidelity()))
    assert not GivenFrames().suits(between)


def test_mistakes_name_the_key(shard, tmp_path):
    for num_given in (0, 9):
        with pytest.raises(ValueError, match="num_given"):
            suite(shard, num_given)
    write_shard(tmp_path / "bad.tar", [{"__key__": "a", "mp4": b"no video"}])
    with pytest.raises(ValueError, match=r"none of the 1 clips.*shards"):
        suite(str(tmp_path / "bad.tar"), 1).requests()
    with pytest.raises(ValueError, match="absent"):
        suite(str(tmp_path / "absent.tar"), 1).requests()
