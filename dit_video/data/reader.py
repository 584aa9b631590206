"""One clip: its members out of a shard, its captions checked, its frames decoded. It is what worker processes run, and imports no torch."""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8

from dit_video.data.audio import AudioFormat, Waveform, decode_audio
from dit_video.data.buckets import ClipShape
from dit_video.data.decode import DecodeError, Decoder, decode_clip
from dit_video.data.index import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from dit_video.data.shards import MAX_JSON_BYTES, ClipRecord, read_members
from dit_video.data.video_file import Video, read_image


@dataclass(frozen=True)
class Job:
    """A clip to be read for a slot of the stream."""

    record: ClipRecord
    slot: int
    shape: ClipShape
    start: float | None = None  # where in a longer source, 0 its beginning to 1 as late as can be; none: as the reader draws it


@dataclass(frozen=True)
class RawStates:
    """States of a caption `l d` as bytes, and its pooled vector."""

    dtype: str
    shape: tuple[int, ...]
    states: bytes
    pooled: bytes | None
    others: "tuple[RawStates, ...]" = ()  # of further encoders


@dataclass(frozen=True)
class ReadClip:
    """What was read beside the pixels."""

    captions: dict[str, str]  # by field, those that the sample has
    fixed: bool  # every slot would get the same pixels
    start: float  # seconds into the source
    has_audio: bool
    checksums: dict[str, int]  # of members that had none in the index
    states: dict[str, RawStates] = field(default_factory=dict)  # of captions, by field, where the shard holds them


@dataclass(frozen=True)
class ClipReader:
    """Reads a clip into `out`, see `layout`; ValueError where it cannot be used, saying why."""

    seed: int  # of where in a longer source a clip begins
    decoder: Decoder
    captions: tuple[str, ...]  # fields: an extension such as txt, or json.NAME for a text in the sample's json
    max_caption_chars: int
    random_start: bool
    audio: AudioFormat | None = None  # None: sound is not decoded

    def num_samples(self, shape: ClipShape) -> int:
        """Samples of sound that go with a clip, in every channel."""
        return self.audio.num_samples(shape.seconds) if self.audio else 0

    def num_bytes(self, shape: ClipShape) -> int:
        """What `out` must hold for a clip."""
        return self._audio_begins(shape) + 4 * self.num_samples(shape) * (self.audio.channels if self.audio else 0)

    def layout(self, shape: ClipShape, out: UInt8[np.ndarray, " bytes"]) -> tuple[Video, Waveform | None]:
        """Views of `out`, which hold the frames of a clip and its sound."""
        video = out[: shape.num_bytes].reshape(shape.num_frames, shape.height, shape.width, 3)
        if self.audio is None:
            return video, None
        sound = out[self._audio_begins(shape) : self.num_bytes(shape)].view(np.float32)
        return video, sound.reshape(self.audio.channels, self.num_samples(shape))

    @staticmethod
    def _audio_begins(shape: ClipShape) -> int:
        return -(-shape.num_bytes // 4) * 4  # a float lies at a multiple of its size

    def __call__(self, job: Job | None, out: UInt8[np.ndarray, " bytes"]) -> ReadClip | None:
        """What was read; None for no job, by which a step without anything to read takes its place among the others."""
        if job is None:
            return None
        record, shape, fixed = job.record, job.shape, True
        extension = find_member(record, shape.num_frames)
        if extension is None:
            raise DecodeError(f"no video: none of {', '.join(VIDEO_EXTENSIONS)} among {sorted(record.members)}")
        sound = next((name for name in AUDIO_EXTENSIONS if name in record.members), None) if self.audio else None
        wanted = [extension, *caption_members(record, self.captions, self.max_caption_chars), *([sound] if sound else [])]
        members = read_members(record, wanted)
        captions = captions_of(members, self.captions, self.max_caption_chars)

        def choose_start(slack: float) -> float:
            nonlocal fixed
            if job.start is not None:
                return slack * job.start
            if not self.random_start or slack < 0.5 / shape.fps:
                return 0.0
            fixed = False
            return np.random.default_rng([self.seed, job.slot]).uniform(0, slack)

        video, waveform = self.layout(shape, out)
        if extension in IMAGE_EXTENSIONS:
            video[0], start, origin = read_image(members[extension], shape.height, shape.width), 0.0, 0.0
        else:
            clip = decode_clip(
                members[extension], num_frames=shape.num_frames, fps=shape.fps, height=shape.height, width=shape.width,
                start_seconds=choose_start, decoder=self.decoder,
            )  # fmt: skip
            video[:], start, origin = clip.video, clip.start, clip.origin
        has_audio = False
        if waveform is not None:
            has_audio = self._hear(waveform, members, extension if sound is None else sound, start, None if sound else origin)
        checksums = {name: zlib.crc32(data) for name, data in members.items() if record.members[name].checksum is None}
        return ReadClip(captions, fixed, start, has_audio, checksums)

    def _hear(self, out: Waveform, members: Mapping[str, bytes], extension: str, start: float, origin: float | None) -> bool:
        """Whether there is sound; `out` is silence where there is none."""
        out[:] = 0
        if self.audio is None or not out.size or extension in IMAGE_EXTENSIONS:
            return False
        seconds = out.shape[1] / self.audio.rate
        heard = decode_audio(members[extension], self.audio, start_seconds=start, seconds=seconds, origin=origin)
        if heard is not None:
            out[:] = heard
        return heard is not None


def find_member(record: ClipRecord, num_frames: int) -> str | None:
    """The extension of the member that holds the pictures of a sample; an image will do where one frame is wanted."""
    wanted = VIDEO_EXTENSIONS + (IMAGE_EXTENSIONS if num_frames == 1 else ())
    return next((extension for extension in wanted if extension in record.members), None)


def caption_members(record: ClipRecord, fields: Sequence[str], max_chars: int) -> list[str]:
    """The members that captions of these fields are in; ValueError where there is none, or one is too large to be read."""
    found = {"json" if name.startswith("json.") else name for name in fields} & record.members.keys()
    if not found:
        raise ValueError(_no_caption(fields, record.members))
    for extension in found:
        size = record.members[extension].size
        if extension in fields and size > 4 * max_chars + 16:  # four bytes a character are the most, in UTF-8
            raise ValueError(f"the caption of {size} bytes is longer than max_caption_chars={max_chars}")
        if size > MAX_JSON_BYTES and extension == "json":
            raise ValueError(f"its json of {size} bytes is larger than {MAX_JSON_BYTES}")
    return sorted(found)


def captions_of(members: Mapping[str, bytes], fields: Sequence[str], max_chars: int) -> dict[str, str]:
    """The captions in the members of a sample, by field; ValueError, saying why, where not one of the fields can be used."""
    found: dict[str, str] = {}
    problems: list[str] = []
    for name in fields:
        try:
            text = _text(members, name)
            if text is not None:
                found[name] = check_caption(text, max_chars)
        except ValueError as error:
            problems.append(str(error))
    if not found:
        raise ValueError("; ".join(dict.fromkeys(problems)) or _no_caption(fields, members.keys()))
    return found


def _no_caption(fields: Sequence[str], extensions: Iterable[str]) -> str:
    return f"no caption: no {' or '.join('.' + name for name in fields)} among {sorted(extensions)}"


def _text(members: Mapping[str, bytes], field: str) -> str | None:
    """The text of a field, None where there is none; ValueError where it cannot be read."""
    if not field.startswith("json."):
        try:
            return members[field].decode("utf-8-sig") if field in members else None
        except UnicodeDecodeError as error:
            raise ValueError(f"the caption is not UTF-8: {error.reason} at byte {error.start}") from error
    try:
        about = json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its json cannot be read: {error}") from error
    text = about.get(field.removeprefix("json.")) if isinstance(about, dict) else None
    return text if isinstance(text, str) else None


def check_caption(text: str, max_chars: int) -> str:
    """The caption, stripped; ValueError where it is empty, too long, or has a NUL or half of a surrogate pair."""
    text = text.strip()
    if len(text) > max_chars:
        raise ValueError(f"the caption of {len(text)} characters is longer than max_caption_chars={max_chars}")
    if not text:
        raise ValueError("the caption is empty")
    if "\0" in text or not _is_whole(text):
        raise ValueError("the caption has a NUL or half a character in it")
    return text


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
