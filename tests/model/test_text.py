"""The text encoder: any text is read, and a caption's states depend on that caption alone."""

import copy
import random

import pytest
import torch

from dit_video.model.frozen import Frozen
from dit_video.model.layers import initialise
from dit_video.model.text import TextEncoder, WordEncoder, hash_word, split_words
from dit_video.shapes import Context, Encoded

TEXTS = [
    "a small red circle moves left",
    'A, "quoted" [brackets] {braces} = true; 50% of #1 & (more) \\ / <b>',
    "ein größerer Kreis; маленький круг; 小さな赤い円が左へ動く; دائرة حمراء",
    "👩‍🚀 zalgo z̷̛a̴l̶g̵o̸ ﷽ \u0000 \u200b \ud800 \uffff",
    "null",
    "'",
    "word " * 50_000,
    "x" * 100_000,
    "\n\ttabs\r\n",
]


@pytest.fixture(scope="module")
def encoder() -> WordEncoder:
    encoder = WordEncoder(dim=16, depth=2, heads=2, buckets=64, max_words=12)
    initialise(encoder, 0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return encoder


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_is_read(encoder: WordEncoder, text: str) -> None:
    context = encoder([text])
    length = context.lengths.item()
    assert 1 <= length <= encoder.max_words and context.states.shape == (1, length, 16)
    assert context.states.isfinite().all() and context.pooled is not None and context.pooled.isfinite().all()


def test_random_unicode_is_read(encoder: WordEncoder) -> None:
    draw = random.Random(0)
    texts = ["".join(chr(draw.randrange(0x110000)) for _ in range(draw.randrange(1, 30))) for _ in range(200)]
    context = encoder(texts)
    assert context.states.isfinite().all() and context.lengths.min() >= 1


def test_words() -> None:
    assert split_words("A red circle, moving-left at 2.5!") == "a red circle , moving - left at 2 . 5 !".split()
    assert split_words("") == split_words("  \n") == [" "]


def test_hashes_are_the_same_everywhere() -> None:
    assert hash_word("circle", 2048) == (179, 1450)
    assert len({hash_word(f"word{i}", 2048) for i in range(5000)}) > 4980  # one table alone would mix most of them up


def test_a_caption_does_not_depend_on_its_batch(encoder: WordEncoder) -> None:
    captions = [*TEXTS, None, "red", ""]
    together = encoder(captions)
    assert together.pooled is not None
    for row, caption in enumerate(captions):
        alone = encoder([caption])
        length = alone.lengths.item()
        assert together.lengths[row] == length
        assert torch.allclose(together.states[row, :length], alone.states[0, :length], atol=1e-5)
        assert torch.allclose(together.pooled[row], alone.pooled[0], atol=1e-5)


def test_words_and_their_order_matter(encoder: WordEncoder) -> None:
    pooled = encoder(["red circle", "circle red", "blue circle", "Red  Circle"]).pooled
    assert torch.allclose(pooled[0], pooled[3], atol=1e-6)
    assert torch.pdist(pooled[:3]).min() > 1e-2


def test_no_caption_is_a_state_of_its_own(encoder: WordEncoder) -> None:
    captions = [None, "", "  \t\n", "a red circle"]
    context = encoder(captions)
    assert context.lengths.tolist() == [1, 1, 1, 3]
    for row in range(3):
        assert torch.equal(context.states[row, 0], encoder.null_state) and torch.equal(context.pooled[row], encoder.null_pooled)
    nothing = encoder([None, None])
    assert nothing.states.shape == (2, 1, 16) and torch.equal(nothing.states[1, 0], encoder.null_state)


def test_every_parameter_learns(encoder: WordEncoder) -> None:
    context = encoder(["a red circle", None])
    states, pooled = context.states[1, 0] - context.states[0], context.pooled[0] - context.pooled[1]
    (states.square().sum() + pooled.square().sum()).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    encoder.zero_grad()


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="set text.dim or text.heads"):
        WordEncoder(dim=20, heads=4)


def test_an_encoder_of_ones_own_needs_encode() -> None:
    encoder = TextEncoder(4)
    initialise(encoder, 0)
    with pytest.raises(NotImplementedError):
        encoder(["text"])


class FrozenStub(TextEncoder):
    """A frozen encoder: pretrained weights outside of the network's own."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__(dim)
        self.pretrained = Frozen(lambda: torch.nn.Embedding(256, dim))

    def encode(self, captions: list[str | Encoded]) -> Context:
        codes = [torch.tensor(list(caption.encode()[:8])) for caption in captions if isinstance(caption, str)]
        lengths = torch.tensor([len(code) for code in codes])
        padded = torch.nn.utils.rnn.pad_sequence(codes, batch_first=True)
        with self.pretrained.on("cpu") as table:
            return Context(table(padded), lengths)


def test_a_frozen_encoder_is_used_but_not_trained_copied_or_saved() -> None:
    with torch.device("meta"):
        encoder = FrozenStub()
    initialise(encoder, 0)
    assert set(encoder.state_dict()) == {"null_state", "null_pooled"}
    context = encoder(["a red circle", None])
    assert context.states.shape == (2, 8, 16) and context.lengths.tolist() == [8, 1]
    with encoder.pretrained.on("cpu") as table:
        assert not table(torch.tensor([1])).requires_grad
    twin = copy.deepcopy(encoder)
    assert twin.pretrained is encoder.pretrained
    assert torch.equal(twin(["a red circle"]).states, context.states[:1])


def test_states_of_another_encoder_are_no_words(encoder: WordEncoder) -> None:
    with pytest.raises(ValueError, match="set text to that encoder"):
        encoder(["a red circle", Encoded(torch.zeros(3, 16))])
