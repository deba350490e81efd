"""Where transformers 5 gives other ids than tokenizer.json: its classes that keep the vocabulary and rebuild the rest.

AutoTokenizer takes a class by tokenizer_config.json and config.json. Most folders get the one that uses tokenizer.json
as it stands; LlamaTokenizer, Qwen2Tokenizer and others take its vocabulary, merges and post-processor, and set
normalizer, pre-tokenizer and the model's switches anew (LlamaTokenizer by `legacy` and `add_prefix_space`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors

from jaxft.data.special_tokens import DECODER, SpecialTokens

AS_IT_STANDS = ("TokenizersBackend", "PreTrainedTokenizer", "PythonBackend", "")
OF_MODELS = {"qwen2": "Qwen2Tokenizer", "gemma2": "GemmaTokenizer", "gpt2": "GPT2Tokenizer"}
DESPITE_THE_FOLDER = ("qwen2",)  # families whose class transformers takes whatever the folder says
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END = "<|endoftext|>"
# Texts in which pipelines differ: blanks, tokens within words, letters in two forms, digits, apostrophes.
PROBES = (
    "a", " a", "  a  b ", "a\n\n b\t", "It's 12345 o'clock, isn't IT?", "e\u0301 \u00e9 \ufb01",
    "a\u00a0b\u3000c \U0001f98a", "x=1;  // y", "",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rebuilt:
    """A class that rebuilds the pipeline.

    Attributes:
      defaults: its special tokens, where no file names them.
      parts: settings of tokenizer_config.json -> (normalizer, pre-tokenizer).
      switches: of the model.
      adds: what it puts before and behind a text whatever tokenizer.json says; None: as there.
    """

    defaults: Mapping[str, str | None]
    parts: Callable[[Mapping[str, Any]], tuple[Any, Any]]
    switches: Mapping[str, Any]
    adds: tuple[str, ...] | None = None


def _llama(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    scheme = "always" if settings.get("legacy", False) else "first"
    if settings.get("add_prefix_space") is False:
        scheme = "never"
    return None, pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)


def _code_llama(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    return _llama({**settings, "legacy": False})


def _gemma(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    return normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")


def _qwen2(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN2), "isolated")
    octets = pre_tokenizers.ByteLevel(_prefixed(settings), use_regex=False)
    return normalizers.NFC(), pre_tokenizers.Sequence([split, octets])


def _gpt2(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    return None, pre_tokenizers.ByteLevel(_prefixed(settings))


def _gpt_neox(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    return normalizers.NFC(), pre_tokenizers.ByteLevel(_prefixed(settings))


def _cohere(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    digits = pre_tokenizers.Digits(individual_digits=True)
    octets = pre_tokenizers.ByteLevel(_prefixed(settings))
    return normalizers.NFC(), pre_tokenizers.Sequence([digits, octets])


def _prefixed(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("add_prefix_space"))


_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_CODE = {
    "prefix_token": "▁<PRE>", "middle_token": "▁<MID>", "suffix_token": "▁<SUF>", "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}  # fmt: skip
_GPT2 = {"bos_token": END, "eos_token": END, "unk_token": END}
_WITH_BYTES = {"fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "dropout": None}
_OF_BYTES = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "dropout": None}
REBUILT = {
    "LlamaTokenizer": Rebuilt(_LLAMA, _llama, _WITH_BYTES),
    "CodeLlamaTokenizer": Rebuilt({**_LLAMA, **_CODE}, _code_llama, _WITH_BYTES, ("bos_token",)),
    "GemmaTokenizer": Rebuilt(
        {
            "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
        _gemma,
        _WITH_BYTES,
    ),
    "Qwen2Tokenizer": Rebuilt(
        {"bos_token": None, "eos_token": END, "unk_token": END, "pad_token": END}, _qwen2, _OF_BYTES
    ),
    "GPT2Tokenizer": Rebuilt({**_GPT2, "pad_token": None}, _gpt2, _OF_BYTES),
    "CodeGenTokenizer": Rebuilt({**_GPT2, "pad_token": None}, _gpt2, _OF_BYTES),
    "GPTNeoXTokenizer": Rebuilt({**_GPT2, "pad_token": "<|padding|>"}, _gpt_neox, _OF_BYTES, ()),
    "CohereTokenizer": Rebuilt(
        {
            "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "unk_token": "<UNK>",
            "pad_token": "<PAD>", "cls_token": "<CLS>", "sep_token": "<SEP>", "mask_token": "<MASK_TOKEN>",
        },
        _cohere,
        _OF_BYTES,
    ),
}  # fmt: skip


def class_of(settings: Mapping[str, Any], model: Mapping[str, Any], octets: bool) -> str:
    """The class that AutoTokenizer takes: a key of `REBUILT`, or "" for that which uses tokenizer.json as it stands.

    Args:
      settings: tokenizer_config.json.
      model: config.json.
      octets: whether tokenizer.json names the byte-level pre-tokenizer or decoder.
    """
    named = settings.get("tokenizer_class") or model.get("tokenizer_class")
    named = str(named).removesuffix("Fast") if named else None
    of_model = OF_MODELS.get(str(model.get("model_type")))
    forced = model.get("model_type") in DESPITE_THE_FOLDER
    if named == "LlamaTokenizer" and octets and not forced:
        return ""
    chosen = of_model if of_model and (named is None or forced) else named
    return chosen if chosen in REBUILT else ""


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether pre-tokenizer, decoder or post-processor work on bytes."""
    parts = (backend.pre_tokenizer, backend.decoder, backend.post_processor, backend.normalizer)
    return any('"ByteLevel"' in _state(part) for part in parts)


def _state(part: Any) -> str:
    return "null" if part is None else bytes(part.__getstate__()).decode()


def tell_where_ids_differ(
    name: str,
    backend: tokenizers.Tokenizer,
    settings: Mapping[str, Any],
    special: SpecialTokens,
    where: str,
) -> None:
    """Says on stderr, with an example, that the class of this name would give other ids than tokenizer.json."""
    reason = _difference(name, backend, settings, special)
    if reason:
        _tell_once(
            f"jaxft: {where}: the ids are those of tokenizer.json as it stands; transformers 5 rebuilds it as "
            f"{name}, {reason}; to have tokenizer.json there too, write "
            '"tokenizer_class": "TokenizersBackend" into tokenizer_config.json'
        )


@functools.lru_cache(maxsize=64)
def _tell_once(line: str) -> None:
    print(line, file=sys.stderr)


def _difference(
    name: str, backend: tokenizers.Tokenizer, settings: Mapping[str, Any], special: SpecialTokens
) -> str:
    if DECODER in settings:
        lost = [
            token.content
            for _, token in sorted(backend.get_added_tokens_decoder().items())
            if token.content not in special.mentioned
        ]
        if lost:
            return f"which does not know {lost[0]!r}, no added token of tokenizer_config.json"
    moved = _moved(backend)
    if moved:
        return moved
    probes = [*PROBES, *_between(backend)]
    ours = [backend.encode(text).ids for text in probes]
    with _rebuilt(REBUILT[name], backend, settings, special.named) as other:
        for text, ids in zip(probes, ours, strict=True):
            theirs = other.encode(text).ids
            if theirs != ids:
                return f"which makes {theirs} of {text!r} and not {ids}"
    return ""


def _moved(backend: tokenizers.Tokenizer) -> str:
    """An added token that gets another id where added tokens are numbered on from the vocabulary."""
    vocabulary = backend.get_vocab(with_added_tokens=False)
    following = len(vocabulary)
    for index, token in sorted(backend.get_added_tokens_decoder().items()):
        there = vocabulary.get(token.content)
        if there is None:
            there, following = following, following + 1
        if there != index:
            return f"which gives {token.content!r} the id {there} and not {index}"
    return ""


@contextlib.contextmanager
def _rebuilt(
    kind: Rebuilt,
    backend: tokenizers.Tokenizer,
    settings: Mapping[str, Any],
    named: Mapping[str, str],
) -> Iterator[tokenizers.Tokenizer]:
    """The pipeline as the class makes it: the backend itself for a while, or a copy where its model is another."""
    model = backend.model
    switches = {key: value for key, value in kind.switches.items() if hasattr(model, key)}
    other = backend
    if any(getattr(model, key) != value for key, value in switches.items()):
        other = tokenizers.Tokenizer.from_str(backend.to_str())
        for key, value in switches.items():
            setattr(other.model, key, value)
    parts = backend.normalizer, backend.pre_tokenizer, backend.post_processor
    try:
        other.normalizer, other.pre_tokenizer = kind.parts(settings)
        if kind.adds is not None:
            before = [named[token] for token in kind.adds if token in named]
            other.post_processor = _adding(before, other)
        yield other
    finally:
        backend.normalizer, backend.pre_tokenizer, backend.post_processor = parts


def _adding(before: Sequence[str], backend: tokenizers.Tokenizer) -> Any:
    single = " ".join([f"{token}:0" for token in before] + ["$A:0"])
    pairs = [(token, backend.token_to_id(token)) for token in before]
    return processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=pairs)


def _between(backend: tokenizers.Tokenizer) -> list[str]:
    """Texts with an added token between words."""
    tokens = [token.content for _, token in sorted(backend.get_added_tokens_decoder().items())][:3]
    return [f"a{token}b {token} c" for token in tokens]
