"""States of captions, remembered in memory and, where a folder is given, on disk, so that a frozen encoder reads each caption once."""

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dit_video.shapes import Encoded

log = logging.getLogger(__name__)


@dataclass
class Counts:
    """What happened to captions so far; one that memory has forgotten meanwhile counts again."""

    captions: int = 0  # that were not in memory
    encoded: int = 0  # of them by the encoder itself, the others came from disk
    truncated: int = 0  # of them longer than what is read
    tokens_cut: int = 0  # from those
    damaged: int = 0  # files that could not be used, and were written anew

    def summary(self) -> dict[str, float]:
        """The counts by name, and the share of captions of which something was cut off."""
        return asdict(self) | {"truncated_share": self.truncated / max(self.captions, 1)}


class Remembered:
    """Looks captions up in memory, then in `folder`, and asks `encode` last, which also says how many tokens it cut off.

    A caption's file is ab/cdef... of the sha256 of (fingerprint, caption), with a checksum of its own in it. Files appear whole, so several
    processes may share the folder; one that is damaged is written anew. Copies of a network share what is remembered.
    """

    def __init__(
        self,
        encode: Callable[[str], tuple[Encoded, int]],
        fingerprint: Callable[[], str],  # of the encoder; asked for only where there is a folder
        folder: str | Path | None,
        memory_bytes: int,  # of states; those that were not asked for the longest are forgotten first
    ) -> None:
        self._encode, self._fingerprint, self.memory_bytes = encode, fingerprint, memory_bytes
        self.folder = None if folder is None else Path(folder)
        self.writes = True  # until the folder takes no more
        self.counts = Counts()
        self._memory: OrderedDict[str, Encoded] = OrderedDict()
        self._held = 0

    def __deepcopy__(self, memo: dict) -> "Remembered":
        return self

    def __call__(self, caption: str) -> Encoded:
        if (known := self.recall(caption)) is not None:
            return known
        found = self._encode(caption)
        self.counts.encoded += 1
        if self.folder is not None and self.writes:
            self._write(self._path(caption), *found)
        return self._keep(caption, *found)

    def recall(self, caption: str) -> Encoded | None:
        """What is known of a caption, in memory or on disk."""
        if (known := self._memory.get(caption)) is not None:
            self._memory.move_to_end(caption)
            return known
        found = None if self.folder is None else self._read(self._path(caption))
        return None if found is None else self._keep(caption, *found)

    def _keep(self, caption: str, encoded: Encoded, cut: int) -> Encoded:
        self.counts.captions += 1
        self.counts.tokens_cut += cut
        self.counts.truncated += cut > 0
        if cut and self.counts.truncated == 1:
            log.warning("%d tokens of a caption are not read: %.60r; others are only counted; set text.max_tokens", cut, caption)
        self._memory[caption] = encoded
        self._held += _num_bytes(encoded)
        while self._held > self.memory_bytes and len(self._memory) > 1:
            self._held -= _num_bytes(self._memory.popitem(last=False)[1])
        return encoded

    def _path(self, caption: str) -> Path:
        assert self.folder is not None
        name = hashlib.sha256(json.dumps([self._fingerprint(), caption]).encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def _read(self, path: Path) -> tuple[Encoded, int] | None:
        try:
            data = path.read_bytes()
            tensors = load(data)
            checksum, cut = bytes(tensors.pop("checksum").tolist()), int(tensors.pop("tokens_cut"))
            if checksum != _checksum(tensors, cut):
                raise ValueError("its checksum does not fit")
            return Encoded(tensors["states"], tensors.get("pooled")), cut
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            self.counts.damaged += 1
            log.warning("%s is damaged (%s); its caption is encoded again", path, error)
            return None

    def _write(self, path: Path, encoded: Encoded, cut: int) -> None:
        tensors = {"states": encoded.states.contiguous()}
        if encoded.pooled is not None:
            tensors["pooled"] = encoded.pooled.contiguous()
        sums = {"checksum": torch.tensor(list(_checksum(tensors, cut)), dtype=torch.uint8), "tokens_cut": torch.tensor(cut)}
        draft = path.with_name(f"{path.stem}.{uuid4().hex}.draft")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(save(tensors | sums))
            os.replace(draft, path)
        except OSError as error:  # training can do without, if more slowly
            log.warning("captions' states are no longer written to %s: %s; set text.cache", self.folder, error)
            self.writes = False
            with suppress(OSError):
                draft.unlink()


def _num_bytes(encoded: Encoded) -> int:
    return sum(tensor.nbytes for tensor in (encoded.states, encoded.pooled) if tensor is not None)


def _checksum(tensors: dict[str, Tensor], cut: int) -> bytes:
    digest = hashlib.sha256(str(cut).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()
