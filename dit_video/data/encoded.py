"""Clips that are stored as latents, with captions that are stored as states, read as any other clip.

A sample holds key.latents.safetensors (mean, and logvar and known where they were kept, all `t h w c`), key.text.safetensors (for each
caption field, such as txt, 0/txt.states `l d` and, where there is one, 0/txt.pooled; 1/ of a second encoder), where the model is told of
first frames so key.image.safetensors (0/image.states `i e`), the captions themselves, and key.json with the clip's shape. Worker
processes read them without torch.
"""

import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
from jaxtyping import UInt8
from safetensors import SafetensorError, deserialize

from dit_video.data.buckets import ClipShape
from dit_video.data.encoding import BYTES, IMAGE, LATENTS, TEXT, Encoding, read_note
from dit_video.data.reader import Job, RawStates, ReadClip, caption_members, captions_of
from dit_video.data.shards import read_members

_DTYPES = {"U8": "uint8", "F16": "float16", "BF16": "bfloat16", "F32": "float32"}  # as safetensors calls them
_EXPONENTS = {"float16": ("<u2", 0x7C00), "bfloat16": ("<u2", 0x7F80), "float32": ("<u4", 0x7F800000)}  # all set where not finite


@dataclass(frozen=True)
class EncodedReader:
    """Reads a clip's latents into `out`, see `size` of the encoding, and its captions' states; ValueError where it cannot be used."""

    encoding: Encoding
    captions: tuple[str, ...]
    max_caption_chars: int
    states: bool = True  # whether the captions' states are wanted, where there are any
    images: bool = True  # the same of the first frames'

    def num_bytes(self, shape: ClipShape) -> int:
        """What `out` must hold for a clip."""
        return int(np.prod(self.encoding.size(shape))) * BYTES[self.encoding.dtype]

    def __call__(self, job: Job | None, out: UInt8[np.ndarray, " bytes"]) -> ReadClip | None:
        """What was read; None for no job."""
        if job is None:
            return None
        record, shape = job.record, job.shape
        own = [LATENTS, *([TEXT] if self.with_states else []), *([IMAGE] if self.with_images else [])]
        for extension in own:
            if extension not in record.members:
                raise ValueError(f"no {extension} among {sorted(record.members)}")
        wanted = [*own, *caption_members(record, self.captions, self.max_caption_chars)]
        members = read_members(record, wanted)
        captions = captions_of(members, self.captions, self.max_caption_chars)
        self._latents(members[LATENTS], shape, out)
        states = self.states_in(members[TEXT], captions) if self.with_states else {}
        if self.with_images:
            states[IMAGE] = self._image(members[IMAGE])
        _, start = read_note(members[LATENTS])
        checksums = {name: zlib.crc32(data) for name, data in members.items() if record.members[name].checksum is None}
        return ReadClip(captions, True, start, False, checksums, states)

    @property
    def with_states(self) -> bool:
        """Whether states are read."""
        return self.states and self.encoding.text is not None

    @property
    def with_images(self) -> bool:
        """Whether states of first frames are read."""
        return self.images and self.encoding.image is not None

    def _tensors(self, data: bytes, what: str) -> dict[str, dict[str, Any]]:
        try:
            if Encoding.from_json(read_note(data)[0]).essence != self.encoding.essence:
                raise ValueError("made otherwise than its shard's index says")
            return dict(deserialize(data))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"its {what} cannot be used: {error}") from error

    def _latents(self, data: bytes, shape: ClipShape, out: UInt8[np.ndarray, " bytes"]) -> None:
        tensors, size, end = self._tensors(data, "latents"), self.encoding.size(shape), 0
        for name in self.encoding.parts:
            found = tensors.get(name)
            if found is None or tuple(found["shape"]) != size[1:] or _DTYPES.get(found["dtype"]) != self.encoding.dtype:
                told = "none" if found is None else f"{found['dtype']} of {tuple(found['shape'])}"
                raise ValueError(
                    f"its latents are {told} where {self.encoding.dtype} of {size[1:]} is expected for {shape}: {name}"
                )
            if not _is_finite(found["data"], self.encoding.dtype):
                raise ValueError(f"its latents are not finite: {name}")
            begin, end = end, end + len(found["data"])
            out[begin:end] = np.frombuffer(found["data"], np.uint8)

    def states_in(self, data: bytes, captions: Collection[str]) -> dict[str, RawStates]:
        """The states that a file holds of captions, by field."""
        tensors = self._tensors(data, "states")
        states = {}
        sizes = self.encoding.text_sizes
        for field in captions:
            first, *others = (self._raw(tensors, name) for name in _names(tensors, field))
            states[field] = replace(first, others=tuple(others))
            found = tuple(_widths(each) for each in (first, *others))
            if sizes and found != sizes:
                raise ValueError(f"states and pooled vectors of its caption {field} are of widths {found}, {sizes} are expected")
        return states

    def _image(self, data: bytes) -> RawStates:
        found = self._raw(self._tensors(data, "states"), "0/image")
        if found.shape != self.encoding.image_size:
            raise ValueError(f"its first frame has states {found.shape}, {self.encoding.image_size} are expected")
        return found

    def _raw(self, tensors: Mapping[str, Any], name: str) -> RawStates:
        found, pooled = tensors.get(f"{name}.states"), tensors.get(f"{name}.pooled")
        kind = "" if found is None else _DTYPES.get(found["dtype"], "")
        if found is None or kind not in _EXPONENTS or len(found["shape"]) != 2 or 0 in found["shape"]:
            raise ValueError(f"it has no states of its caption {name}")
        if pooled is not None and (pooled["dtype"] != found["dtype"] or len(pooled["shape"]) != 1):
            raise ValueError(f"states and pooled vector of its caption {name} are of two kinds")
        if not all(_is_finite(each["data"], kind) for each in (found, pooled) if each is not None):
            raise ValueError(f"the states of its caption {name} are not finite")
        return RawStates(kind, tuple(found["shape"]), bytes(found["data"]), None if pooled is None else bytes(pooled["data"]))


def _widths(states: RawStates) -> tuple[int, int]:
    """Of states, and of the pooled vector beside them; 0 where there is none."""
    return states.shape[1], len(states.pooled or b"") // BYTES[states.dtype]


def _is_finite(data: bytes, dtype: str) -> bool:
    """Whether all numbers are, of which the bytes are stored."""
    if dtype not in _EXPONENTS:
        return True
    word, exponent = _EXPONENTS[dtype]
    return bool(((np.frombuffer(data, word) & exponent) != exponent).all())


def _names(tensors: Mapping[str, Any], field: str) -> Iterator[str]:
    """What the states are called that each encoder gave a caption; one there must be."""
    yield f"0/{field}"
    for number in count(1):
        if f"{number}/{field}.states" not in tensors:
            return
        yield f"{number}/{field}"
