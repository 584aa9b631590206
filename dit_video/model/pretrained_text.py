"""Text encoders that were trained elsewhere: a folder as transformers writes it, read as it is and never trained.

One caption is read at a time, without padding, so its states depend on it alone, to the bit, and no mask is needed. Nothing is fetched,
unpickled or executed: weights are safetensors, and code in a folder stays where it is.
"""

import hashlib
import html
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import pad_sequence

from dit_video.model.frozen import Frozen, Placement, Precision
from dit_video.model.headers import expanded, num_weights
from dit_video.model.layers import RMSNorm, linear
from dit_video.model.remembered import Counts, Remembered
from dit_video.model.text import TextEncoder, TextLayer, says, split_words
from dit_video.model.transformers_folders import (
    check_numbers,
    checksum,
    find_folder,
    one_line,
    quiet,
    read_config,
    unusable,
    weight_files,
)
from dit_video.shapes import Caption, Context, Encoded

KEY = "text.folder"
Pooled = Literal["none", "mean", "cls", "eos", "projection"]

TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
TOKENIZER_FILES = (*VOCABULARIES, "merges.txt", "added_tokens.json", "special_tokens_map.json", TOKENIZER_CONFIG)
SPACES = "▁Ġ "
"""How tokenizers write the space before a word."""

UNUSED = re.compile(r"(^|\.)pooler\.")
"""Weights that may be missing, as nothing here asks for what they make."""


@dataclass(frozen=True)
class Reading:
    """How a text becomes states, whatever the weights are."""

    layer: int | None = None
    pooled: Pooled = "none"
    max_tokens: int = 512
    template: str = "{}"
    drop_tokens: int = 0
    clean: bool = False
    dtype: Precision = "float32"

    def __post_init__(self) -> None:
        for name, value, kind in (("pooled", self.pooled, Pooled), ("dtype", self.dtype, Precision)):
            if value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}; set text.{name}")
        if self.max_tokens < 1 or self.drop_tokens < 0:
            raise ValueError(
                f"an encoder reads at least 1 token and drops 0 or more, got {self.max_tokens} and {self.drop_tokens}; "
                "set text.max_tokens and text.drop_tokens"
            )
        if self.template.count("{}") != 1:
            raise ValueError(f"a template holds {{}} once, where the caption goes, got {self.template!r}; set text.template")

    def text(self, caption: str) -> str:
        """What the tokenizer is given."""
        caption = caption.encode(errors="replace").decode()  # half a character is none
        return self.template.replace("{}", cleaned(caption) if self.clean else caption)


def cleaned(caption: str) -> str:
    """The caption as Wan 2.1 cleans it: mojibake mended, HTML's escapes undone, white space single."""
    try:
        import ftfy  # type: ignore[import-untyped,import-not-found]
    except ImportError as error:
        raise ValueError("captions are cleaned by ftfy: pip install 'dit-video[text]', or set text.clean=false") from error
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split())


class PretrainedText(TextEncoder):
    """A frozen encoder of transformers: T5 and UMT5 (the encoder), CLIP (the text tower), BERT, and language models.

    Nothing but its null state is trained or saved, and its folder is not touched before the first caption that is words: where all come
    as states it need not be there, and without contents (the meta device) states are imagined, one a word. ValueError, naming the file
    and text.folder, for a folder that cannot be used.
    """

    def __init__(
        self,
        folder: str | None,  # with config.json, *.safetensors and a tokenizer; package:NAME/FOLDER lies in an installed package
        dim: int,  # width of its states
        pooled_dim: int = 0,  # width of its pooled vector
        tokenizer: str | None = None,  # the tokenizer's folder; none: the same (diffusers keeps it in a folder of its own)
        layer: int | None = None,  # whose states: 0 embeddings, 1 the first layer, -2 the last but one; none: the model's output
        pooled: Pooled = "none",  # mean, first (cls) or last (eos) of the model's last states; projection: CLIP's
        max_tokens: int = 512,  # what follows is not read, which is counted; tokens that are dropped come on top
        template: str = "{}",  # what language models are told around the caption
        drop_tokens: int = 0,  # states that are dropped at the beginning: the template's
        clean: bool = False,  # ftfy, HTML and white space, as Wan does
        no_caption: Literal["learned", "encoded"] = "learned",  # a learned state, or the states of the empty text
        dtype: Precision = "float32",  # of its weights, and of states that are kept
        placement: Placement = "device",  # between uses; or offload: in the host's memory, or shard: cut over the ranks
        cache: str | None = None,  # a folder where states are kept; none: in memory alone
        memory_bytes: int = 2**30,  # of states in memory
    ) -> None:
        self.reading = Reading(layer, pooled, max_tokens, template, drop_tokens, clean, dtype)
        if no_caption not in ("learned", "encoded"):
            raise ValueError(f"no_caption must be learned or encoded, got {no_caption!r}; set text.no_caption")
        if (pooled == "none") != (pooled_dim == 0):
            raise ValueError(f"pooled={pooled} does not go with pooled_dim={pooled_dim}; set text.pooled or text.pooled_dim")
        super().__init__(dim, pooled_dim, learned_null=no_caption == "learned")
        self.folder, self.tokenizer_folder, self.no_caption = folder, tokenizer or folder, no_caption
        self.nothing: Encoded | None = None  # states of the empty text, where they are known from elsewhere
        self.pretrained = Frozen(self._load, placement)
        self.remembered = Remembered(self._read, lambda: self.fingerprint, cache and str(expanded(cache)), memory_bytes)
        self.like: Tensor  # where the network is and in what precision, learned null state or not
        self.register_buffer("like", torch.zeros(()), persistent=False)

    @property
    def name(self) -> str:
        kind = read_config(find_folder(self.folder, KEY), KEY)["model_type"]
        return f"{kind} {self.fingerprint[:8]}"

    @property
    def is_frozen(self) -> bool:
        return True

    @property
    def is_here(self) -> bool:
        return self.folder is not None

    @property
    def is_cut(self) -> bool:
        return self.is_here and self.pretrained.is_cut

    def device_bytes(self, ranks: int = 1, in_use: bool = False) -> int:
        return self.pretrained.device_bytes(self._num_bytes, ranks, in_use) if self.is_here else 0

    def _num_bytes(self) -> int:
        numbers = num_weights(weight_files(find_folder(self.folder, KEY), KEY), KEY)
        return numbers * int(getattr(torch, self.reading.dtype).itemsize)

    def check(self) -> None:
        weight_files(find_folder(self.folder, KEY), KEY)
        check_tokenizer_is_there(find_folder(self.tokenizer_folder, KEY))

    @property
    def counts(self) -> Counts:
        """What happened to captions so far."""
        return self.remembered.counts

    def summary(self) -> dict[str, float]:
        """The counts, for the record of a run."""
        return self.counts.summary()

    @cached_property
    def fingerprint(self) -> str:
        """Changes with all that states depend on: the config, the tokenizer, the weights' bytes, and how they are read."""
        folder, tokenizer = find_folder(self.folder, KEY), find_folder(self.tokenizer_folder, KEY)
        config = json.dumps(read_config(folder, KEY), sort_keys=True)
        sums = {path.name: checksum(path) for path in [*tokenizer_files(tokenizer), *weight_files(folder, KEY)]}
        return hashlib.sha256(json.dumps([config, sums, asdict(self.reading)], sort_keys=True).encode()).hexdigest()[:16]

    def states_of(self, caption: str) -> Encoded:
        """A caption's states, in the host's memory; of nothing they are those of the empty text."""
        if not says(caption):
            return self.nothing or self.remembered("")
        return self.remembered(caption)

    def imagined(self, num_words: int) -> Encoded:
        return self._blank(min(num_words, self.reading.max_tokens), torch.empty(0))

    @property
    def needs_nothing(self) -> bool:
        return self.no_caption == "encoded"

    def take_nothing(self, states: Encoded) -> None:
        self.nothing = self._checked(states)

    def encode(self, captions: list[str | Encoded]) -> Context:
        with self._read_by_all(captions) as known:
            found = [
                self._checked(each) if isinstance(each, Encoded) else known.get(each) or self._states(each) for each in captions
            ]
        states = pad_sequence([each.states.to(self.like) for each in found], batch_first=True)
        lengths = torch.tensor([len(each.states) for each in found], device=states.device)
        pooled = [each.pooled.to(self.like) for each in found if each.pooled is not None]
        return Context(states, lengths, torch.stack(pooled) if self.pooled_dim else None)

    @contextmanager
    def _read_by_all(self, captions: list[str | Encoded]) -> Iterator[dict[str, Encoded]]:
        """Of what is cut over ranks all gather the weights where any has a caption that it must read; gives the states of the others.

        All ranks come here equally often, with whatever captions.
        """
        if self._is_imagined or not self.is_cut:
            yield {}
            return
        words = {each for each in captions if isinstance(each, str) and (says(each) or self.nothing is None)}
        known = {each: states for each in words if (states := self.remembered.recall(each)) is not None}
        with (
            self.pretrained.on(self.like.device)
            if self.pretrained.wanted(known.keys() != words, self.like.device)
            else nullcontext()
        ):
            yield known

    def unused(self) -> Encoded:
        return self._blank(1, self.like)

    def forward(self, captions: Sequence[Caption]) -> Context:
        if self.no_caption == "learned":
            return super().forward(captions)
        return self.encode([caption if says(caption) else "" for caption in captions])

    def _states(self, caption: str) -> Encoded:
        if self._is_imagined:
            return self._blank(min(len(split_words(caption)), self.reading.max_tokens), self.like)
        return self.states_of(caption)

    @property
    def _is_imagined(self) -> bool:
        """Nothing is computed, so nothing is read: only the shape counts."""
        return self.like.is_meta or isinstance(self.like, FakeTensor)

    def _blank(self, length: int, like: Tensor) -> Encoded:
        return Encoded(like.new_zeros(length, self.dim), like.new_zeros(self.pooled_dim) if self.pooled_dim else None)

    def _checked(self, caption: Encoded) -> Encoded:
        """States that came with the clips, if they can be this encoder's."""
        if caption.others:
            count = 1 + len(caption.others)
            raise ValueError(f"the clips' captions come as states of {count} encoders, this is one; set text=several")
        width, pooled = caption.states.shape[1], 0 if caption.pooled is None else len(caption.pooled)
        if width != self.dim or (self.pooled_dim and pooled != self.pooled_dim):
            raise ValueError(
                f"the clips' captions come as states of width {width} and pooled {pooled}, the text encoder's have {self.dim} and "
                f"{self.pooled_dim}; set text to the encoder that they were written with, or write them again"
            )
        return caption

    def _read(self, caption: str) -> tuple[Encoded, int]:
        with self.pretrained.on(self.like.device) as model:
            encoded, cut = model(caption)
        return encoded.to("cpu"), cut

    def _load(self) -> "Pretrained":
        return load(
            find_folder(self.folder, KEY), find_folder(self.tokenizer_folder, KEY), self.reading, self.dim, self.pooled_dim
        )


class Several(TextEncoder):
    """Encoders, one or several, that read every caption, and layers of attention over what they say.

    Their states follow each other, each encoder's by a learned linear; `depth` layers that are trained with the video model let them
    look at each other before the video looks at them: a token refiner, as of HunyuanVideo (arXiv 2412.03603), here without the
    noise level. Their pooled vectors are joined as they are. A caption that comes as states is the first encoder's, with the
    others' beside it, in order (`Encoded.others`).
    """

    def __init__(self, encoders: dict[str, TextEncoder], dim: int, pooled_dim: int, depth: int = 0, heads: int = 4) -> None:
        joined = sum(encoder.pooled_dim for encoder in encoders.values())
        if not encoders or pooled_dim != joined:
            raise ValueError(
                f"pooled vectors of {list(encoders)} have {joined} values together, got {pooled_dim}; set text.pooled_dim"
            )
        if depth < 0 or (depth and (heads < 1 or dim % heads)):
            raise ValueError(
                f"layers over states take depth 0 or more and heads that divide dim {dim}, got {depth} and {heads}; "
                "set text.depth, text.heads or text.dim"
            )
        super().__init__(dim, pooled_dim, learned_null=False)
        self.encoders = nn.ModuleDict(encoders)
        self.norms = nn.ModuleDict({name: RMSNorm(encoder.dim) for name, encoder in encoders.items()})
        self.linears = nn.ModuleDict({name: linear(encoder.dim, dim, matrices=0) for name, encoder in encoders.items()})
        self.layers = nn.ModuleList(TextLayer(dim, heads) for _ in range(depth))

    @property
    def fingerprint(self) -> str:
        """That of all the encoders, which have one where they are frozen."""
        return hashlib.sha256(" ".join(encoder.fingerprint for encoder in self._each()).encode()).hexdigest()[:16]

    @property
    def is_frozen(self) -> bool:
        return all(encoder.is_frozen for encoder in self._each())

    @property
    def name(self) -> str:
        return " and ".join(encoder.name for encoder in self._each())

    @property
    def is_here(self) -> bool:
        return all(encoder.is_here for encoder in self._each())

    @property
    def is_cut(self) -> bool:
        return any(encoder.is_cut for encoder in self._each())

    def device_bytes(self, ranks: int = 1, in_use: bool = False) -> int:
        between = [encoder.device_bytes(ranks) for encoder in self._each()]
        more = [encoder.device_bytes(ranks, True) - own for encoder, own in zip(self._each(), between, strict=True)]
        return sum(between) + (max(more) if in_use else 0)  # they are used one after the other

    def check(self) -> None:
        for encoder in self._each():
            encoder.check()

    def summary(self) -> dict[str, float]:
        """The counts of the frozen ones, by name."""
        frozen = {name: encoder for name, encoder in self.encoders.items() if isinstance(encoder, PretrainedText)}
        return {f"{name}.{key}": value for name, encoder in frozen.items() for key, value in encoder.summary().items()}

    def states_of(self, caption: str) -> Encoded:
        """A caption's states of every encoder, in the host's memory; all must be frozen."""
        first, *others = [encoder.states_of(caption) for encoder in self._each()]
        return Encoded(first.states, first.pooled, tuple(others))

    def imagined(self, num_words: int) -> Encoded:
        first, *others = (encoder.imagined(num_words) for encoder in self._each())
        return replace(first, others=tuple(others))

    @property
    def needs_nothing(self) -> bool:
        return any(encoder.needs_nothing for encoder in self._each())

    def take_nothing(self, states: Encoded) -> None:
        for encoder, own in zip(self._each(), self._split(states), strict=True):
            encoder.take_nothing(own)

    def forward(self, captions: Sequence[Caption]) -> Context:
        split = [self._split(caption) for caption in captions]
        contexts = {name: encoder([each[i] for each in split]) for i, (name, encoder) in enumerate(self.encoders.items())}
        states = []
        for name, context in contexts.items():  # whose weights may be gathered in another precision than an encoder's
            own = context.states.to(self.linears[name].weight.dtype)
            states.append(self.linears[name](self.norms[name](own)))
        pooled = [context.pooled for context in contexts.values() if context.pooled is not None]
        joined, lengths = closed_up(states, [context.lengths for context in contexts.values()])
        for layer in self.layers:
            joined = layer(joined, lengths)
        return Context(joined, lengths, torch.cat(pooled, dim=-1) if pooled else None)

    def _each(self) -> Iterator[Any]:
        return iter(self.encoders.values())

    def _split(self, caption: Caption) -> list[Caption]:
        """What each of the encoders is told."""
        if not isinstance(caption, Encoded):
            return [caption] * len(self.encoders)
        if 1 + len(caption.others) != len(self.encoders):
            raise ValueError(
                f"the clips' captions come as states of {1 + len(caption.others)} encoders, text.encoders are {list(self.encoders)}; "
                "set text to what they were written with"
            )
        return [Encoded(caption.states, caption.pooled), *caption.others]


def closed_up(states: Sequence[Tensor], lengths: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Several states `b l d` of each caption, one after the other without what lies behind their lengths, and the lengths of the whole."""
    real = [torch.arange(x.shape[1], device=x.device) < own[:, None] for x, own in zip(states, lengths, strict=True)]
    keep = torch.cat(real, dim=1)
    order = keep.int().argsort(dim=1, descending=True, stable=True)  # no length is asked for by the host
    joined = (torch.cat(list(states), dim=1) * keep[..., None]).take_along_dim(order[..., None], dim=1)
    return joined, torch.stack(list(lengths)).sum(dim=0)


class Pretrained(nn.Module):
    """A model of transformers with its tokenizer, reading one caption at a time."""

    def __init__(self, model: Any, tokenizer: Any, reading: Reading) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer, self.reading = tokenizer, reading
        self.rows = model.get_input_embeddings().weight.shape[0]  # one a token that it knows

    def forward(self, caption: str) -> tuple[Encoded, int]:
        """A caption's states, and how many of its tokens were cut off."""
        reading = self.reading
        tokens, cut = self.tokens(reading.text(caption))
        ids = torch.tensor([tokens], device=next(self.model.parameters()).device)
        output = self.model(input_ids=ids, output_hidden_states=reading.layer is not None)
        last = output.last_hidden_state[0]
        states = last if reading.layer is None else output.hidden_states[reading.layer][0]
        first = min(reading.drop_tokens, len(tokens) - 1)  # one stays at least
        pooled = {
            "none": lambda: None, "mean": lambda: last[first:].mean(dim=0), "cls": lambda: last[0], "eos": lambda: last[-1],
            "projection": lambda: output.text_embeds[0],
        }[reading.pooled]()  # fmt: skip
        return Encoded(states[first:].clone(), pooled), cut

    def tokens(self, text: str) -> tuple[list[int], int]:
        """The ids of a text's tokens, at least one, and how many more there were."""
        limit = self.reading.max_tokens + self.reading.drop_tokens
        tokens = self.ids(text)
        if not tokens:  # language models begin with nothing
            special = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
            return [next((token for token in special if token is not None and token < self.rows), 0)], 0
        if len(tokens) <= limit:
            return tokens, 0
        return self.ids(text, truncation=True, max_length=limit), len(tokens) - limit

    def ids(self, text: str, **asked: Any) -> list[int]:
        """What the tokenizer makes of a text, without tokens added to it that the model has no row for, such as those of pictures."""
        return [token for token in self.tokenizer(text, verbose=False, **asked)["input_ids"] if token < self.rows]


# --------------------------------------------------------------------------- loading


def load(folder: Path, tokenizer_folder: Path, reading: Reading, dim: int, pooled_dim: int) -> Pretrained:
    """A folder's encoder with all its weights, tried on a word; ValueError saying what is wrong and which key to change."""
    found = read_config(folder, KEY)
    files = weight_files(folder, KEY)
    try:
        import transformers
    except ImportError as error:
        raise ValueError("this text encoder needs transformers: pip install 'dit-video[text]', or set text=words") from error
    if found["model_type"] not in transformers.CONFIG_MAPPING:
        own = ", and whose own code (auto_map) is never executed" if "auto_map" in found else ""
        known = f"transformers {transformers.__version__}"
        raise unusable(folder, f"has model_type {found['model_type']}, which {known} does not know{own}", KEY)
    only = {"local_files_only": True, "trust_remote_code": False}
    with quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(folder, **only)
        except Exception as error:  # each library below has its own
            raise unusable(folder / "config.json", f"cannot be used: {one_line(error)}", KEY) from error
        check_sizes(config, folder, reading, dim, pooled_dim)
        tokenizer = load_tokenizer(transformers, tokenizer_folder, reading)
        make, config = class_of(transformers, config, reading.pooled)
        check_numbers(lambda: empty(make, config), files, KEY)
        try:
            model, told = make.from_pretrained(
                folder, config=config, dtype=getattr(torch, reading.dtype), use_safetensors=True, attn_implementation="eager",
                output_loading_info=True, ignore_mismatched_sizes=True, **only,
            )  # fmt: skip
        except Exception as error:
            raise unusable(folder, f"cannot be loaded: {one_line(error)}", KEY) from error
    lost = [name for name in sorted(told["missing_keys"]) if not UNUSED.search(name)]
    lost += [name[0] for name in sorted(told["mismatched_keys"])] + list(told["error_msgs"])
    if lost:
        raise unusable(folder, f"lacks weights, or has them in other shapes: {lost[0]} and {len(lost) - 1} more", KEY)
    if config.is_encoder_decoder:
        model = model.get_encoder()
    try:
        read = Pretrained(model.eval(), tokenizer, reading)
    except Exception as error:
        raise unusable(folder, f"has no table of tokens: {one_line(error)}", KEY) from error
    return tried(read, folder, tokenizer_folder, dim, pooled_dim)


def load_tokenizer(transformers: Any, folder: Path, reading: Reading) -> Any:
    """A folder's tokenizer, which knows words; ValueError saying what is wrong and which key to change."""
    check_tokenizer_is_there(folder)
    reading.text("word")  # may lack a package
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.truncation_side = "right"  # what follows is not read, whatever the folder says
        own = len(tokenizer("")["input_ids"])
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("word", add_special_tokens=False)["input_ids"])
    except Exception as error:  # whatever is in somebody's files
        raise ValueError(f"{folder} has no tokenizer to be used: {one_line(error)}; set text.tokenizer") from error
    if not [token for token in tokens if token != tokenizer.unk_token and token.strip(SPACES)]:  # as it is made of no vocabulary
        raise ValueError(f'{folder} has a tokenizer that knows no words: "word" becomes {tokens}; set text.tokenizer')
    if reading.max_tokens + reading.drop_tokens <= own:
        raise ValueError(
            f"{folder} has a tokenizer that adds {own} tokens to a text, text.max_tokens and text.drop_tokens are {reading.max_tokens} and "
            f"{reading.drop_tokens}; set text.max_tokens={own + 1 - reading.drop_tokens} or more"
        )
    return tokenizer


def check_tokenizer_is_there(folder: Path) -> None:
    """ValueError where nothing in a folder speaks of a tokenizer."""
    if not any((folder / name).is_file() for name in (*VOCABULARIES, TOKENIZER_CONFIG)):
        raise ValueError(f"{folder} has no tokenizer: none of {', '.join((*VOCABULARIES, TOKENIZER_CONFIG))}; set text.tokenizer")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that tokens may depend on: where no vocabulary has a known name, all but large ones, weights and the config."""
    if any((folder / name).is_file() for name in VOCABULARIES):
        return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != "config.json" and ".safetensors" not in path.name and path.stat().st_size < 2**26
    ]


def check_sizes(config: Any, folder: Path, reading: Reading, dim: int, pooled_dim: int) -> None:
    """ValueError where a model has other widths than were said."""
    text = config.get_text_config()
    if text.hidden_size != dim:
        raise ValueError(f"states of {folder} have width {text.hidden_size}, text.dim is {dim}; set text.dim={text.hidden_size}")
    wide = getattr(text, "projection_dim", None) if reading.pooled == "projection" else dim
    if pooled_dim and wide != pooled_dim:
        raise ValueError(
            f"{reading.pooled} of {folder} has width {wide}, text.pooled_dim is {pooled_dim}; set text.pooled_dim or text.pooled"
        )


def class_of(transformers: Any, config: Any, pooled: Pooled) -> tuple[Any, Any]:
    """The class that reads text and no more, and the config it takes."""
    if config.model_type in ("clip", "clip_text_model"):
        config = config.get_text_config()
        return transformers.CLIPTextModelWithProjection if pooled == "projection" else transformers.CLIPTextModel, config
    config.use_cache = config.get_text_config().use_cache = False
    if type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:  # T5's kin: the decoder is not even made
        config.is_encoder_decoder = False
        return transformers.AutoModelForTextEncoding, config
    return transformers.AutoModel, config


def empty(make: Any, config: Any) -> nn.Module:
    """What a class makes of a config."""
    if hasattr(make, "from_config"):  # a choice of classes
        return make.from_config(config, attn_implementation="eager", trust_remote_code=False)
    return make._from_config(config, attn_implementation="eager")


@torch.no_grad()
def tried(model: Pretrained, folder: Path, tokenizer_folder: Path, dim: int, pooled_dim: int) -> Pretrained:
    """The model, when it turns a word into states; ValueError where it does not."""
    check_ids(model, tokenizer_folder)
    try:
        encoded, _ = model("word")
    except IndexError as error:
        raise ValueError(f"{folder} has no layer {model.reading.layer}: {error}; set text.layer") from error
    except Exception as error:  # whatever a model of another kind asks for
        raise unusable(folder, f"does not read text alone: {one_line(error)}", KEY) from error
    pooled = 0 if encoded.pooled is None else len(encoded.pooled)
    if (encoded.states.shape[1], pooled) != (dim, pooled_dim):
        raise ValueError(f"{folder} gives widths {encoded.states.shape[1]} and {pooled}; set text.dim and text.pooled_dim")
    if not encoded.states.isfinite().all():
        raise ValueError(f"{folder} gives states that are no numbers in {model.reading.dtype}; set text.dtype")
    check_positions(model, folder)
    return model


def check_ids(model: Pretrained, tokenizer_folder: Path) -> None:
    """ValueError where the tokenizer makes ids of words, or puts some around them, that the model has no row for."""
    tokenizer = model.tokenizer
    words = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    largest = max([*words, *tokenizer(model.reading.text("word"), verbose=False)["input_ids"]])
    if largest >= model.rows:
        raise ValueError(
            f"{tokenizer_folder} has a tokenizer with ids up to {largest}, and the model knows {model.rows} tokens; "
            "set text.tokenizer to the one that belongs to text.folder"
        )


def check_positions(model: Pretrained, folder: Path) -> None:
    """ValueError, with a number that works, where the model reads fewer tokens than it is to read."""
    reading, positions = model.reading, getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    asked = reading.max_tokens + reading.drop_tokens
    if not positions or positions < 0 or (asked <= positions and has_room(model, asked)):  # XLNet says -1
        return
    room = bisect_left(range(1, min(asked, positions) + 1), True, key=lambda length: not has_room(model, length))
    more = f"text.max_tokens={room - reading.drop_tokens}" if room > reading.drop_tokens else f"text.drop_tokens below {room}"
    raise ValueError(
        f"{folder} reads {room} tokens, text.max_tokens and text.drop_tokens are {reading.max_tokens} and {reading.drop_tokens}; "
        f"set {more}"
    )


class LookedUp(Exception):  # noqa: N818
    """Positions were found, and what follows does not matter."""


@torch.no_grad()
def has_room(model: Pretrained, length: int) -> bool:
    """Whether the model has positions for so many tokens; RoBERTa's kin begin behind that of padding. Its layers are not run.

    Where positions are in no table that a text is looked up in, as those of rotations are, it has.
    """
    tables = [module for name, module in model.model.named_modules() if isinstance(module, nn.Embedding) and "position" in name]
    if not tables:
        return True

    def stop(*_: Any) -> None:
        raise LookedUp

    hooks = [table.register_forward_hook(stop) for table in tables]
    token = model.tokenizer("word", add_special_tokens=False)["input_ids"][-1]  # padding has no position of its own
    try:
        for tokens in (1, length):
            with suppress(LookedUp):
                model.model(input_ids=torch.full((1, tokens), token))
                return True  # no table is asked, those that there are being for pictures
        return True
    except Exception:  # it reads a word, so that this is for want of positions, which every kind of model says in its way
        return False
    finally:
        for hook in hooks:
            hook.remove()
