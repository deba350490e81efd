"""A folder's tokenizer as a GGUF file says it: the inverse of `tokenizer`, read back and compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tokenizers

from jaxft.data.tokenizer import Tokenizer
from jaxft.errors import UserError
from jaxft.formats.gguf.header import Header
from jaxft.formats.gguf.tokenizer import CONTROL, SPLITS, UNKNOWN, UNUSED, USER, tokenizer_files

NORMAL, BYTE = 1, 6
# Texts in which pipelines differ: blanks, digits, apostrophes, capitals, letters in two forms, signs, other scripts.
PROBES = (
    "a", " a", "  a  b ", "a\n\n b\t", "It's 12345 o'clock, isn't IT?", "a  1  22\n 333", "naïve e\u0301 \ufb01",
    "ABCdef GhI", "a\u00a0b\u3000c \U0001f98a 日本", "x=1;  // y/\n", "", "don'T /usr/bin\n\n",
)  # fmt: skip
KINDS = (
    "gpt-2", "smollm", "llama-bpe", "qwen2", "stablelm2", "dbrx", "tekken", "gpt-4o", "seed-coder",
)  # fmt: skip


def tokenizer_metadata(tokenizer: Tokenizer, rows: int, kind: str) -> dict[str, Any]:
    """The keys under `tokenizer.` of a file.

    Args:
        tokenizer: of a folder.
        rows: of the embedding: rows that no token has are filled up.
        kind: how the architecture reads a SentencePiece vocabulary: "gemma", or "" as llama.

    Raises:
        UserError: a tokenizer whose ids a file of this kind cannot give.
    """
    spelled = json.loads(tokenizer.backend.to_str())
    model = spelled["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(
            f"{tokenizer.name}: a tokenizer of the kind {model['type']} is not written to GGUF: BPE is"
        )
    merges = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
    common = _common(tokenizer, spelled, rows)
    if model.get("byte_fallback"):
        tries = [lambda: _sentencepiece(common, merges, spelled, kind)]
    else:
        names = [name for name in KINDS if SPLITS[name].whole == bool(model.get("ignore_merges"))]
        tries = [_byte_level(common, merges, name) for name in names]
    wanted = _ids(tokenizer.backend)
    for made in tries:
        metadata = made()
        if _ids(_read_back(metadata, kind)) == wanted:
            return metadata
    raise UserError(
        f"{tokenizer.name}: none of the ways in which llama.cpp cuts a text ({', '.join(KINDS)}) gives the ids of this "
        "tokenizer.json"
    )


def _ids(backend: tokenizers.Tokenizer) -> list[list[int]]:
    return [backend.encode(text).ids for text in PROBES]


def _read_back(metadata: dict[str, Any], kind: str) -> tokenizers.Tokenizer:
    files = tokenizer_files(Header(Path("the file"), metadata, {}), kind)
    return tokenizers.Tokenizer.from_str(files["tokenizer.json"])


def _common(tokenizer: Tokenizer, spelled: dict[str, Any], rows: int) -> dict[str, Any]:
    """The tokens by their ids and their kinds, the named ones, and what is put before and behind a text."""
    by_id = {index: token for token, index in tokenizer.backend.get_vocab().items()}
    if by_id and max(by_id) >= rows:
        raise UserError(f"{tokenizer.name}: has the id {max(by_id)}, and the embedding {rows} rows")
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(rows)]
    kinds = [NORMAL if index in by_id else UNUSED for index in range(rows)]
    for one in spelled["added_tokens"]:
        kinds[one["id"]] = CONTROL if one["special"] else USER
    named = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "padding": tokenizer.pad_id,
        "unknown": tokenizer.backend.token_to_id(tokenizer.special_tokens.get("unk_token") or ""),
        "eot": next((end for end in tokenizer.eos_ids if end != tokenizer.eos_id), None),
    }
    ids = tokenizer.backend.encode("a").ids
    metadata: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": index
        for name, index in named.items()
        if index is not None
    }
    metadata |= {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_bos_token": len(ids) > 1 and ids[0] == tokenizer.bos_id,
        "tokenizer.ggml.add_eos_token": len(ids) > 1 and ids[-1] == tokenizer.eos_id,
    }
    if tokenizer.chat_template:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _byte_level(
    common: dict[str, Any], merges: Iterable[list[str]], name: str
) -> Callable[[], dict[str, Any]]:
    return lambda: {
        **common,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }


def _sentencepiece(
    common: dict[str, Any], merges: Iterable[list[str]], spelled: dict[str, Any], kind: str
) -> dict[str, Any]:
    """The scores by which the merges follow one another: llama.cpp merges into the token of the best score."""
    tokens, kinds = common["tokenizer.ggml.tokens"], list(common["tokenizer.ggml.token_type"])
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    unknown = spelled["model"].get("unk_token")
    for index, token in enumerate(tokens):
        if kinds[index] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            kinds[index] = BYTE
        elif token == unknown:
            kinds[index] = UNKNOWN
    if kind == "gemma":
        tokens = [" " * len(t) if len(t) > 1 and set(t) == {"▁"} else t for t in tokens]
    before = json.dumps([spelled.get("normalizer"), spelled.get("pre_tokenizer")])
    prefixed = '"Prepend"' in before or any(f'"{way}"' in before for way in ("first", "always"))
    return {
        **common,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [
            -float(ranks.get(token, len(ranks))) for token in common["tokenizer.ggml.tokens"]
        ],
        "tokenizer.ggml.add_space_prefix": prefixed,
    }
