"""dit-video sample: videos of prompts from a trained run, as mp4 files with an index."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.console import Console

from dit_video.build import check_whole
from dit_video.data.video_file import contact_sheet, read_image, read_video
from dit_video.eval.judge import Clip
from dit_video.evaluate import chosen_sampler, open_run
from dit_video.runs import Run, check_folder, describe, write_clips
from dit_video.sampler.generate import Request, check_request


def main(config: DictConfig) -> None:
    """Samples every prompt with every seed."""
    check_whole(config, 1, "count", "num_frames", "height", "width", "steps", "given_frames")
    check_whole(config, 0, "seed")
    prompts = read_prompts(config)
    run = open_run(config)
    sampler = chosen_sampler(run, config)
    requests = [make_request(run, config, prompt, config.seed + number) for prompt in prompts for number in range(config.count)]
    for request in requests:
        check_request(request, run.trained)
    out = Path(config.out) if config.out else run.folder / "sampled" / name_of(requests, sampler)
    check_folder(out)
    videos = run.generate(requests, sampler)
    write_clips(out, [Clip("sample", request, video) for request, video in zip(requests, videos, strict=True)], sampler)
    contact_sheet(videos, [request.prompt for request in requests], out / "contact_sheet.png")
    Console().print(f"{len(videos)} videos, index.jsonl and contact_sheet.png in {out}", soft_wrap=True)


def read_prompts(config: DictConfig) -> list[str]:
    """The prompt, or those of a file: a text file has one a line, a .jsonl file a "prompt" each."""
    if (config.prompt is None) == (config.prompts is None):
        raise ValueError("one of prompt and prompts must be given; set prompt to a text, or prompts to a file of them")
    if config.prompt is not None:
        return [config.prompt]
    path = Path(config.prompts)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}; set prompts to a file of prompts"
        ) from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]  # splitlines would cut a prompt at more than line ends
    if not lines:
        raise ValueError(f"{path} has no prompt in it; set prompts to another file")
    if path.suffix != ".jsonl":
        return lines
    found: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = json.loads(line)["prompt"]
            if not isinstance(prompt, str):
                raise TypeError(f"it is {prompt!r}")
            found.append(prompt)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number} is not a JSON object with a "prompt": {error}; set prompts to another file'
            ) from error
    return found


def make_request(run: Run, config: DictConfig, prompt: str, seed: int) -> Request:
    """What the command line asks for: an image is a first frame, a video's frames are the first ones."""
    size: dict[str, Any] = {key: config[key] for key in ("num_frames", "height", "width", "fps")}
    request = run.request(prompt, seed, **size, negative_prompt=config.negative_prompt)
    if config.image is not None and config.video is not None:
        raise ValueError("an image and a video cannot both be given; leave image or video out")
    if config.image is not None:
        request.given, request.task = read_first_frame(config.image, request), "image_to_video"
        if config.last_image is not None:
            last = read_first_frame(config.last_image, request)
            request.given = np.concatenate([request.given, *[last] * run.trained.tokens.span.t])
            request.task = "in_between"
    elif config.video is not None:
        request.given, request.task = read_given(run, config, request), "extend"
    if config.task is not None:
        request.task = config.task
    return request


def read_first_frame(path: str, request: Request) -> np.ndarray:
    """An image as one frame in the request's size."""
    try:
        return read_image(path, request.height, request.width)[None]
    except ValueError as error:
        raise ValueError(f"{error}; set image to another file") from error


def read_given(run: Run, config: DictConfig, request: Request) -> np.ndarray:
    """The last frames of a video that the model can go on from, as many as `given_frames` says, in the request's size."""
    try:
        video, _ = read_video(config.video)
    except ValueError as error:
        raise ValueError(f"{error}; set video to another file") from error
    pt, wanted = run.trained.tokens.span.t, config.given_frames
    count = wanted if wanted is not None else 1 + pt
    if len(video) < count:
        raise ValueError(f"{config.video} has {len(video)} frames, {count} are wanted; set given_frames")
    if video.shape[1:3] != (request.height, request.width):
        raise ValueError(f"{config.video} is {video.shape[1]}x{video.shape[2]} pixels; set height and width to that")
    return video[-count:]


def name_of(requests: list[Request], sampler: Any) -> str:
    """A folder's name from what was asked, so that asking for the same again ends in the same place."""
    asked = [(r.prompt, r.negative_prompt, r.seed, r.shape, r.given.tobytes() if r.given is not None else b"") for r in requests]
    digest = hashlib.sha256(repr((asked, describe(sampler), sampler.shift)).encode()).hexdigest()[:8]
    words = "".join(letter if letter.isalnum() else "_" for letter in requests[0].prompt.lower())[:40].strip("_")
    return f"{words or 'prompt'}-{digest}"
