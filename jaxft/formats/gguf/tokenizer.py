"""The tokenizer of a GGUF file as tokenizer.json, tokenizer_config.json and a chat template.

The file has the vocabulary, the merges or scores, and the name of the pipeline around them ("pre"): what such a
name means stands in `SPLITS`. Where it says nothing, what llama.cpp does holds. Ids are those of the tokenizer.json
that the file was made from. transformers' own reading leaves out parts of some pipelines, so that its ids differ where
the part counts: of smollm it cuts no digits apart ("a  1"), of qwen2 it composes no letters.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jaxft.errors import UserError, nearest, shown
from jaxft.formats.gguf.header import Header

UNKNOWN, CONTROL, USER, UNUSED = 2, 3, 4, 5  # kinds of tokens beside ordinary ones
CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = (
    rf"{CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
)
SEED = QWEN.replace(r"\p{N}]+[\r\n]*|", r"\p{N}]+|")
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%"
_SIGNS = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
TEKKEN = _WORDS.replace("%", "") + r"|\p{N}" + _SIGNS
GPT4O = _WORDS.replace("%", f"{CONTRACTED}?") + r"|\p{N}{1,3}" + _SIGNS


@dataclasses.dataclass(frozen=True)
class Split:
    """How a byte-level pipeline cuts a text before the merges.

    Attributes:
        pattern: what stays together; "" for GPT-2's.
        digits: whether digits are cut apart first.
        composed: whether letters are composed (NFC).
        whole: whether a piece that is a token stays whole, whatever the merges say.
        bos: whether a BOS is put before a text where the file does not say.
    """

    pattern: str = ""
    digits: bool = False
    composed: bool = False
    whole: bool = False
    bos: bool = False


_GPT2, _DIGITS = Split(), Split(digits=True)
_LLAMA3, _QWEN = Split(LLAMA3, whole=True, bos=True), Split(QWEN, composed=True)
SPLITS = {
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "gigachat", "mellum", "trillion", "exaone4"), _GPT2
    ),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), Split(LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez"), _QWEN),
    "stablelm2": Split(QWEN),
    "seed-coder": Split(SEED),
    "tekken": Split(TEKKEN, whole=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Split(GPT4O)),
}
NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # each ends a generation


def tokenizer_files(header: Header, kind: str) -> dict[str, str]:
    """{name: text} of a file's tokenizer and of what is generated with it.

    Args:
        header: of the file.
        kind: how its architecture reads a SentencePiece vocabulary: "gemma", or "" as llama.

    Returns:
        tokenizer.json, tokenizer_config.json, generation_config.json, and chat_template.jinja where there is one.

    Raises:
        UserError: a kind of tokenizer that is not read, or a vocabulary that is damaged.
    """
    tokens = header.need("tokenizer.ggml.tokens", list)
    types = header.metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not tokens or len(types) != len(tokens) or not all(isinstance(t, str) for t in tokens):
        raise UserError(
            f"{header.file}: tokenizer.ggml.tokens and token_type do not fit each other"
        )
    model = header.need("tokenizer.ggml.model", str)
    if model not in MODELS:
        raise UserError(
            f"{header.file}: a tokenizer of the kind {shown(model)} is not read{nearest(model, MODELS)}; these are: "
            f"{', '.join(MODELS)}"
        )
    backend, adds_bos = MODELS[model](header, tokens, types, kind)
    settings = _settings(header, tokens, adds_bos)
    _add_tokens(backend, tokens, types)
    _add_ends(backend, settings, header)
    ids = {key: value for key in NAMED.values() if (value := _id(header, key)) is not None}
    ends = list(dict.fromkeys(filter(lambda i: i is not None, (_id(header, key) for key in ENDS))))
    generation = {
        "bos_token_id": ids.get("bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids.get("padding_token_id"),
    }
    files = {
        "tokenizer.json": backend.to_str(pretty=False),
        "tokenizer_config.json": _json(settings),
        "generation_config.json": _json({k: v for k, v in generation.items() if v is not None}),
    }
    template = header.metadata.get("tokenizer.chat_template")
    return files | ({"chat_template.jinja": template} if isinstance(template, str) else {})


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _id(header: Header, key: str) -> int | None:
    """The id that the file names, where its vocabulary has it."""
    value = header.metadata.get(f"tokenizer.ggml.{key}")
    size = len(header.metadata["tokenizer.ggml.tokens"])
    return value if type(value) is int and 0 <= value < size else None


def _settings(header: Header, tokens: Sequence[str], adds_bos: bool) -> dict[str, Any]:
    """tokenizer_config.json: a class that takes tokenizer.json as it stands, and the named tokens."""
    named = {
        name: tokens[index]
        for name, key in NAMED.items()
        if (index := _id(header, key)) is not None
    }
    flags = {
        "add_bos_token": bool(header.metadata.get("tokenizer.ggml.add_bos_token", adds_bos)),
        "add_eos_token": bool(header.metadata.get("tokenizer.ggml.add_eos_token", False)),
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return named | flags


def _byte_level(
    header: Header, tokens: Sequence[str], types: Sequence[int], kind: str
) -> tuple[tokenizers.Tokenizer, bool]:
    """BPE over bytes, as GPT-2's, with the cuts that the file names."""
    name = header.metadata.get("tokenizer.ggml.pre", "default")
    if name != "default" and name not in SPLITS:
        raise UserError(
            f"{header.file}: how {shown(name)} cuts a text (tokenizer.ggml.pre) is not known to jaxft"
            f"{nearest(str(name), SPLITS)}"
        )
    split = SPLITS.get(name, _GPT2)
    vocabulary = _vocabulary(tokens, types)
    merges = [_pair(merge) for merge in header.need("tokenizer.ggml.merges", list)]
    merges = [pair for pair in merges if {*pair, "".join(pair)} <= vocabulary.keys()]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split.whole))
    backend.normalizer = normalizers.NFC() if split.composed else None
    octets = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split.pattern)
    before: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] * split.digits
    if split.pattern:
        before.append(pre_tokenizers.Split(tokenizers.Regex(split.pattern), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, octets]) if before else octets
    backend.decoder = decoders.ByteLevel()
    return backend, split.bos


def _pair(merge: Any) -> tuple[str, str]:
    left, _, right = str(merge).partition(" ")
    return left, right


def _vocabulary(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """{token: id} without the entries that only fill up the embedding's rows."""
    return {
        token: index
        for index, token in enumerate(tokens)
        if types[index] != UNUSED or token != f"[PAD{index}]"
    }


def _sentencepiece(
    header: Header, tokens: Sequence[str], types: Sequence[int], kind: str
) -> tuple[tokenizers.Tokenizer, bool]:
    """BPE over letters, with bytes for letters that the vocabulary lacks; its merges follow from the scores.

    Gemma's follow from the order of its tokens, and its runs of spaces are spelled as spaces in the file.
    """
    gemma = kind == "gemma"
    scores = header.metadata.get("tokenizer.ggml.scores") or []
    if gemma:
        tokens = ["▁" * len(token) if token and not token.strip(" ") else token for token in tokens]
        scores = [-float(index) for index in range(len(tokens))]
    if len(scores) != len(tokens):
        raise UserError(f"{header.file}: tokenizer.ggml.scores does not fit the tokens")
    vocabulary = _vocabulary(tokens, types)
    unknown = _id(header, NAMED["unk_token"])
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            _merges(vocabulary, scores),
            unk_token=tokens[unknown if unknown is not None else 0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        prefixed = bool(header.metadata.get("tokenizer.ggml.add_space_prefix", True))
        scheme = "first" if prefixed else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        back += [decoders.Strip(" ", 1, 0)] * prefixed
    backend.decoder = decoders.Sequence(back)
    return backend, True


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that a vocabulary implies: of two tokens into a third, the best score first."""
    found = [
        (-scores[index], -cut, cut - len(token), vocabulary[left], vocabulary[right], left, right)
        for token, index in vocabulary.items()
        for cut in range(1, len(token))
        if (left := token[:cut]) in vocabulary and (right := token[cut:]) in vocabulary
    ]
    return [one[-2:] for one in sorted(found, key=lambda one: one[:5])]


def _add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control tokens, and those that a text keeps whole, as added tokens."""
    added = [
        tokenizers.AddedToken(token, normalized=False, special=kind in (CONTROL, UNKNOWN))
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER, UNKNOWN) and backend.token_to_id(token) is not None
    ]
    backend.add_tokens(added)


def _add_ends(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], header: Header) -> None:
    """Has the pipeline put BOS before a text and EOS behind it, where the file says so."""
    ends = {}
    for name in ("bos", "eos"):
        if settings[f"add_{name}_token"] and f"{name}_token" in settings:
            ends[name] = (settings[f"{name}_token"], _id(header, f"{name}_token_id"))
    if not ends:
        return

    def template(segment: int) -> list[str]:
        mark = "A" if segment == 0 else "B"
        before = [f"{ends['bos'][0]}:{segment}"] if "bos" in ends else []
        behind = [f"{ends['eos'][0]}:{segment}"] if "eos" in ends else []
        return [*before, f"${mark}:{segment}", *behind]

    backend.post_processor = processors.TemplateProcessing(
        single=template(0), pair=[*template(0), *template(1)], special_tokens=list(ends.values())
    )


MODELS = {"gpt2": _byte_level, "llama": _sentencepiece}
