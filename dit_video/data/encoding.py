"""What the latents and states of a shard were made with: a note in the header of every file of them, and in the shard's index."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dit_video.data.buckets import ClipShape

LATENTS, TEXT, IMAGE = "latents.safetensors", "text.safetensors", "image.safetensors"
NOTHING = "nothing.safetensors"
"""A file beside the shards, with the states of the empty caption."""
BYTES = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
MAX_HEADER_BYTES = 2**20
MAX_SIZE = 2**16  # of a note's sizes, by which memory is made
BESIDE = ("clips", "text_sizes", "captions")  # what a note says beside who made the latents and states


@dataclass(frozen=True)
class Encoding:
    """What the clips of a shard were made with."""

    autoencoder: str  # class and fingerprint
    compression: tuple[int, int, int]  # frames, rows and columns of pixels in a latent
    channels: int
    dtype: str  # of the latents: uint8 (of pixels), float16, bfloat16 or float32
    logvar: bool  # whether the logarithm of the variance lies beside the mean
    known: bool  # whether the latents of the first frame with grey after it do
    text: str | None  # encoder and fingerprint of the captions' states; none: there are none
    clips: str  # how clips were cut from their sources, in words
    image: str | None = None  # encoder and fingerprint of the first frames' states; none: there are none
    image_size: tuple[int, int] = (0, 0)  # how many states a frame has, and their width
    text_sizes: tuple[tuple[int, int], ...] = ()  # widths of states and pooled vector, of each text encoder; none: not told
    captions: tuple[str, ...] = ()  # fields of the captions that lie with the clips; none: not told

    def to_json(self) -> str:
        """One line that is the same for equal encodings."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def essence(self) -> str:
        """The same for encodings whose latents and states may be mixed, whatever clips were cut from."""
        return json.dumps({key: value for key, value in asdict(self).items() if key not in BESIDE}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Encoding":
        """Undoes to_json; ValueError where it is no encoding."""
        try:
            found = json.loads(text)
            found |= {name: tuple(found[name]) for name in ("compression", "image_size", "captions") if name in found}
            made = cls(**found | {"text_sizes": tuple((width, pooled) for width, pooled in found.get("text_sizes", ()))})
            sizes = [*made.compression, made.channels, *(made.image_size if made.image else ())]
            sizes += [size for width, pooled in made.text_sizes for size in (width, pooled or 1)]
            lengths = (len(made.compression), len(made.image_size))
            whole = all(isinstance(size, int) and 0 < size <= MAX_SIZE for size in sizes)
            named = all(isinstance(each, str) for each in made.captions)
            if made.dtype not in BYTES or lengths != (3, 2) or not whole or not named:
                raise ValueError(f"it is {made}")
            return made
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"the note of what made these latents cannot be read ({error})") from error

    @property
    def parts(self) -> tuple[str, ...]:
        """What is stored of a clip's latents, in order."""
        return ("mean", *(["logvar"] if self.logvar else []), *(["known"] if self.known else []))

    def size(self, shape: ClipShape) -> tuple[int, int, int, int, int]:
        """What is stored of a clip: how many of `parts`, frames, rows and columns of latents, channels."""
        t, h, w = self.compression
        return len(self.parts), 1 + (shape.num_frames - 1) // t, shape.height // h, shape.width // w, self.channels


def note_of(encoding: Encoding, start: float = 0.0) -> dict[str, str]:
    """What the header of a safetensors file says: one entry, as several are written in a random order, and equal clips shall be equal."""
    return {"about": json.dumps({"encoding": encoding.to_json(), "start": start})}


def read_note(data: bytes) -> tuple[str, float]:
    """The encoding and the start in seconds that the header of a file says, of which the first bytes will do; ValueError without one."""
    try:
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["about"])
        return str(about["encoding"]), float(about["start"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"not a safetensors file that says what made it ({error})") from error


def encoding_of(first_bytes: bytes) -> str:
    """The note of what made a file of latents, as its first bytes say."""
    return Encoding.from_json(read_note(first_bytes)[0]).to_json()


def one_encoding(found: Sequence[tuple[str, str]]) -> Encoding | None:
    """The encoding of shards, given by name, of which none, or all alike, have any; ValueError naming two that differ."""
    different: dict[str, tuple[str, str]] = {}
    for name, note in reversed(found):
        try:
            different[Encoding.from_json(note).essence if note else ""] = (note, name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if len(different) > 1:
        (one, first), (other, second) = sorted(different.values(), key=lambda each: each[1])[:2]
        raise ValueError(f"{first} and {second} were not made alike: {differences(one, other)}")
    note = next(iter(different.values()), ("", ""))[0]
    return Encoding.from_json(note) if note else None


def differences(one: str, other: str) -> str:
    """In what two notes differ, in words."""
    a, b = (asdict(Encoding.from_json(note)) if note else {} for note in (one, other))
    if not a or not b:
        return "one holds latents, the other does not"
    return "; ".join(f"{key} {a[key]} and {b[key]}" for key in a if a[key] != b[key] and key not in BESIDE)
