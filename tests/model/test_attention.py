"""Attention: every implementation against the others, and lengths against cutting."""

import importlib

import pytest
import torch

from dit_video.model.attention import Flash, key_mask, math, sdpa
from dit_video.seeding import seeded


def example(num_queries: int, num_keys: int, batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    sizes = (num_queries, num_keys, num_keys)
    return tuple(torch.randn(batch, 2, n, 16, generator=seeded(n, i), dtype=torch.float32).to(dtype) for i, n in enumerate(sizes))


@pytest.mark.parametrize(("num_queries", "num_keys"), [(7, 7), (7, 12), (1, 1), (5, 3)])
@pytest.mark.parametrize("lengths", [None, [1, 2, 3], [3, 3, 1]])
def test_written_out_equals_torch(num_queries: int, num_keys: int, lengths: list[int] | None) -> None:
    query, key, value = example(num_queries, num_keys)
    real = None if lengths is None else torch.tensor(lengths).clamp(max=num_keys)
    assert torch.allclose(math(query, key, value, lengths=real), sdpa(query, key, value, lengths=real), atol=1e-5)


def test_written_out_is_the_formula() -> None:
    query, key, value = example(4, 6)
    weights = (torch.einsum("bhne,bhme->bhnm", query, key) / 16**0.5).exp()
    wanted = torch.einsum("bhnm,bhme->bhne", weights / weights.sum(-1, keepdim=True), value)
    assert torch.allclose(math(query, key, value), wanted, atol=1e-5)


def test_gradients_are_equal_too() -> None:
    grads = []
    for attend in (math, sdpa):
        inputs = [x.requires_grad_() for x in example(5, 8)]
        attend(*inputs, lengths=torch.tensor([8, 5, 2])).square().sum().backward()
        grads.append([x.grad for x in inputs])
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("attend", [sdpa, math])
def test_lengths_are_the_same_as_cutting(attend) -> None:  # type: ignore[no-untyped-def]
    query, key, value = example(5, 9)
    lengths = [9, 4, 1]
    masked = attend(query, key, value, lengths=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        cut = attend(query[row : row + 1], key[row : row + 1, :, :length], value[row : row + 1, :, :length])
        assert torch.allclose(masked[row : row + 1], cut, atol=1e-6)


def test_key_mask() -> None:
    assert key_mask(torch.tensor([2, 0]), 3)[:, 0, 0].tolist() == [[True, True, False], [False, False, False]]


def packed(query, key, value, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):  # type: ignore[no-untyped-def]
    """What flash-attn computes, sequence by sequence; n heads e."""
    assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    out = torch.empty_like(query)
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert len(q) == len(k) and q[-1] == len(query) and k[-1] == len(key) == len(value)
    for i in range(len(q) - 1):
        assert q[i + 1] - q[i] <= max_seqlen_q and k[i + 1] - k[i] <= max_seqlen_k
        one = (query[q[i] : q[i + 1]], key[k[i] : k[i + 1]], value[k[i] : k[i + 1]])
        out[q[i] : q[i + 1]] = math(*(x.float().transpose(0, 1)[None] for x in one))[0].transpose(0, 1).to(query.dtype)
    return out


def flash_of(function) -> Flash:  # type: ignore[no-untyped-def]
    flash = Flash.__new__(Flash)
    flash.function, flash.name, flash.checked = function, "a stand-in", set()
    return flash


@pytest.mark.parametrize("lengths", [None, [11, 4, 1]])
@pytest.mark.parametrize("num_keys", [7, 11])
def test_flash_packs_and_unpacks(lengths: list[int] | None, num_keys: int) -> None:
    query, key, value = example(7, num_keys, dtype=torch.bfloat16)
    real = None if lengths is None else torch.tensor(lengths).clamp(max=num_keys)
    wanted = sdpa(query.float(), key.float(), value.float(), lengths=real)
    for function in (packed, lambda *x, **more: (packed(*x, **more), None)):  # version 2 gives a tensor, 3 and 4 a tuple
        flash = flash_of(function)
        assert torch.allclose(flash(query, key, value, lengths=real).float(), wanted, atol=0.02)
        assert flash.checked == {(torch.bfloat16, 16)}


def test_flash_that_computes_something_else_is_refused() -> None:
    query, key, value = example(7, 7, dtype=torch.bfloat16)
    flash = flash_of(lambda *x, **more: packed(*x, **more) * 1.1)
    with pytest.raises(ValueError, match="a stand-in differs.*set model/attention=sdpa"):
        flash(query, key, value)
    with pytest.raises(ValueError, match="takes float16 or bfloat16.*set trainer.precision"):
        flash(query.float(), key.float(), value.float())


def flash_modules() -> list[str]:
    found = []
    for name in ("flash_attn.cute", "flash_attn_interface", "flash_attn"):
        try:
            found += [name] if hasattr(importlib.import_module(name), "flash_attn_varlen_func") else []
        except ImportError:
            continue
    return found


def test_flash_is_found_or_its_absence_said() -> None:
    if flash_modules():
        assert Flash().name.startswith("flash-attn")
    else:
        with pytest.raises(ValueError, match="needs flash-attn.*set model/attention=sdpa"):
            Flash()


@pytest.mark.skipif(not (flash_modules() and torch.cuda.is_available()), reason="flash-attn or a GPU is missing")
@pytest.mark.parametrize("lengths", [None, [11, 4, 1]])
def test_real_flash_equals_torch(lengths: list[int] | None) -> None:
    query, key, value = (torch.randn(3, 2, n, 128, device="cuda", dtype=torch.bfloat16) for n in (7, 11, 11))
    real = None if lengths is None else torch.tensor(lengths, device="cuda")
    wanted = sdpa(query.float(), key.float(), value.float(), lengths=real)
    assert torch.allclose(Flash()(query, key, value, lengths=real).float(), wanted, atol=0.02)
