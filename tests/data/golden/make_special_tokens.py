"""Writes what transformers makes of folders whose files name special tokens in many ways (extra `reference`).

    python tests/data/golden/make_special_tokens.py

metaspace/tokenizer.json   a small tokenizer as Llama 2 has it: a blank is put before every part of a text
special_tokens.json        folders (the other files beside tokenizer.json), and of each what AutoTokenizer says: its
                           class, the named special tokens, the ids of a few texts
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, processors, trainers

HERE = Path(__file__).parent
TEXTS = ("the cat</s>sat", "<new>a b<new> c", "  a <extra> b<pad>c", "It's <s>1234\n\n e\u0301")
LLAMA = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}


def added(content: str, **changed: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"__type": "AddedToken", "content": content, **flags, **changed}


def plain(content: str, **changed: Any) -> dict[str, Any]:
    return {name: value for name, value in added(content, **changed).items() if name != "__type"}


def metaspace() -> None:
    tokenizer = tokenizers.Tokenizer(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    octets = [f"<0x{octet:02X}>" for octet in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<unk>", "<s>", "</s>", *octets], show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on a mat, it is 1234 b c"] * 9, trainer)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = raw["added_tokens"][:3]
    (HERE / "metaspace").mkdir(exist_ok=True)
    (HERE / "metaspace/tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False))


def folders() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def case(
        tokenizer: str, settings: Any, mapped: Any = None, more: Any = None, model: Any = LLAMA
    ) -> None:
        files = {
            "config.json": model, "tokenizer_config.json": settings,
            "special_tokens_map.json": mapped, "added_tokens.json": more,
        }  # fmt: skip
        present = {name: content for name, content in files.items() if content is not None}
        found.append({"tokenizer": tokenizer, "files": present})

    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
    nothing: dict[str, Any] = {}
    values = [
        nothing,
        {"bos_token": None},
        {"bos_token": "<s>"},
        {"bos_token": added("<new>", lstrip=True)},
    ]
    over = [nothing, {"bos_token": None}, {"bos_token": "</s>"}, {"bos_token": plain("<new>")}]
    decoders_ = [nothing, {"added_tokens_decoder": {"0": plain("<s>", special=True)}}]
    for one, other, decoder in itertools.product(values, over, decoders_):
        case("tokenizer", {**fast, **one, **decoder}, other)
    for one, other in itertools.product(values, over):
        case("metaspace", {"tokenizer_class": "LlamaTokenizer", "legacy": True, **one}, other)
    further = [
        {"additional_special_tokens": ["<extra>"]}, {"extra_special_tokens": ["<extra>"]},
        {"extra_special_tokens": {"image_token": "<extra>"}}, {"image_token": "<extra>"},
        {"image_token": added("<extra>")},
        {"additional_special_tokens": ["<extra>"], "extra_special_tokens": ["<new>"]},
        {"split_special_tokens": True},
        {"added_tokens_decoder": {"999": plain("<new>", special=False, lstrip=True)}},
    ]  # fmt: skip
    maps = [None, {"additional_special_tokens": ["<new>"]}, {"extra_special_tokens": {"image_token": "<new>"}},
            {"image_token": plain("<new>")}]  # fmt: skip
    for one, other in itertools.product(further, maps):
        case("tokenizer", {**fast, "eos_token": "</s>", **one}, other)
    for more in ({"<new>": 500}, {"<new>": 500, "<extra>": 499}):
        case("tokenizer", {**fast, "extra_special_tokens": ["<extra>"]}, None, more)
    for name in ("LlamaTokenizer", "CodeLlamaTokenizer"):
        for setting in (
            {"legacy": False},
            {"legacy": True},
            nothing,
            {"add_prefix_space": False, "legacy": False},
        ):
            case(
                "metaspace",
                {"tokenizer_class": name, "eos_token": "</s>", "bos_token": "<s>", **setting},
            )
    for name in ("GPT2Tokenizer", "Qwen2TokenizerFast", "GPTNeoXTokenizer", "LlamaTokenizerFast", "CodeGenTokenizer",
                 "CohereTokenizer", "TokenizersBackend", "Unknown"):  # fmt: skip
        known = {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<pad>",
            "pad_token": "<pad>",
        }
        case("tokenizer", {"tokenizer_class": name, **known})
        case(
            "tokenizer",
            {"tokenizer_class": name, **known, "add_prefix_space": True, "add_eos_token": True},
        )
    for kind in ("qwen2", "gpt2"):
        case("tokenizer", {"eos_token": "</s>", "unk_token": "<pad>"}, model={"model_type": kind})
        case("tokenizer", {**fast, "eos_token": "</s>"}, model={"model_type": kind})
    return found


def said(folder: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        for name, content in folder["files"].items():
            Path(place, name).write_text(json.dumps(content))
        shutil.copyfile(
            HERE / folder["tokenizer"] / "tokenizer.json", Path(place, "tokenizer.json")
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    return folder | {
        "class": type(tokenizer).__name__,
        "named": dict(tokenizer.special_tokens_map),
        "ids": {text: tokenizer(text)["input_ids"] for text in TEXTS},
    }


def main() -> None:
    metaspace()
    lines = ",\n".join(json.dumps(said(folder)) for folder in folders())
    (HERE / "special_tokens.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
