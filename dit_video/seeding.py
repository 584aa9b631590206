"""Where randomness comes from: explicit parts such as (seed, slot), never a rank, a worker or a clock."""

import hashlib

import torch


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator whose stream depends on the given parts alone, such as (seed, slot, purpose)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
