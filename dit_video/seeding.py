"""Where randomness comes from: explicit parts such as (seed, slot), never a rank, a worker or a clock."""

import hashlib

import torch


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator whose stream depends on the given parts alone, such as (seed, slot, purpose)."""
    return torch.Generator().manual_seed(_hash(parts) >> 1)


def fraction(*parts: object) -> float:
    """A number in [0, 1) that depends on the given parts alone."""
    return (_hash(parts) >> 11) / 2**53


def _hash(parts: tuple[object, ...]) -> int:
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "little")
