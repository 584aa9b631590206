"""Tiny random text encoders of transformers with a tokenizer of bytes, as published folders hold them."""

from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

TEXTS = ["a small red circle moves left", "snow", "a large blue square bounces off the edge of the table in dim light"]
SPECIAL = {"t5": "$A </s>", "clip": "<s> $A </s>", "bert": "<s> $A </s>", "language": "$A", "gemma": "<s> $A"}
T5 = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
PLAIN = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 96}
LANGUAGE = PLAIN | {"num_key_value_heads": 2, "head_dim": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def config_of(kind: str) -> Any:
    if kind in ("t5", "umt5"):
        make = transformers.T5Config if kind == "t5" else transformers.UMT5Config
        return make(vocab_size=96, **T5)
    if kind.startswith("clip"):
        text = PLAIN | {"max_position_embeddings": 40, "projection_dim": 12, "bos_token_id": 1, "eos_token_id": 2}
        vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 4}
        if kind == "clip_text":
            return transformers.CLIPTextConfig(**text)
        return transformers.CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 2}, projection_dim=12)
    if kind == "bert":
        return transformers.BertConfig(max_position_embeddings=40, **PLAIN)
    name = {"qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "gemma": "GemmaConfig", "gemma3": "Gemma3TextConfig"}[kind]
    return getattr(transformers, name)(**LANGUAGE)


WHOLE = {  # what is saved: with a decoder, a picture tower, a head, as published folders are
    "t5": "T5ForConditionalGeneration", "umt5": "UMT5ForConditionalGeneration", "clip": "CLIPModel",
    "clip_text": "CLIPTextModelWithProjection",
    "bert": "BertForMaskedLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "gemma": "GemmaForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}  # fmt: skip
ALONE = {  # what is compared with
    "t5": "T5EncoderModel", "umt5": "UMT5EncoderModel", "clip": "CLIPTextModelWithProjection", "clip_text": "CLIPTextModelWithProjection",
    "bert": "BertModel", "qwen2": "Qwen2Model", "qwen3": "Qwen3Model", "gemma": "GemmaModel", "gemma3": "Gemma3TextModel",
}  # fmt: skip


def save_tokenizer(folder: Path, kind: str) -> None:
    """A tokenizer of bytes, with the special tokens of its kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=96, special_tokens=special))
    template = SPECIAL["t5" if kind == "umt5" else "clip" if kind.startswith("clip") else kind if kind in SPECIAL else "language"]
    named = [(token, tokenizer.token_to_id(token)) for token in special if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
