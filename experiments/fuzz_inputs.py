"""The inputs of fuzz.py: sound files, how they are broken, and what reads them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from fuzz_templates import statement

from jaxft.adaptation import adapt
from jaxft.assets import tiny_folder
from jaxft.configuration import flatten, from_json, load_config, to_json
from jaxft.data import encode_chat_with_mask, load_tokenizer, prepare_examples, read_rows
from jaxft.formats import load, load_adapter, save, save_adapter
from jaxft.formats.config_file import model_config
from jaxft.formats.safetensors import open_folder
from jaxft.methods import METHODS, row_of
from jaxft.models import Config, Transformer
from jaxft.models.transformer import initial_params

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
Try = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Sound files, in a folder that is the run's.

    Attributes:
        home: the run's folder; a fresh one of its subfolders is used for each input.
        params: the tree of the small base.
        tokenizer: the embedded base's.
    """

    home: Path
    params: Any
    tokenizer: Any

    @classmethod
    def made(cls, home: Path) -> Inputs:
        """A Llama of two layers, whole and in shards, and a LoRA adapter of it."""
        config = Config("llama", 32, 8, 16, 2, 2, 1, 4, 16, tied=True)
        params = initial_params(config, jax.random.key(0))
        save(Transformer(config), params, home / "base")
        save(Transformer(config), params, home / "shards", shard_bytes=1500)
        for name in ("lora", "dora", "vera"):
            method = row_of(name)(rank=2, targets=("q_proj", "up_proj"))
            save_adapter(adapt(params, method, jax.random.key(1)), home / name, method=method)
        shutil.copytree(tiny_folder(), home / "tokenizer", ignore=lambda *_: ["model.safetensors"])
        _, params = load(home / "base")
        return cls(home, params, load_tokenizer(home / "tokenizer", ""))

    def copy(self, name: str) -> Path:
        """A fresh copy of one of the folders, to be broken."""
        folder = self.home / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.home / name, folder)
        return folder


# Values and bytes


def odd_value(draw: random.Random, depth: int = 2) -> Any:
    """A JSON value that nobody expects."""
    kinds: list[Callable[[], Any]] = [
        lambda: draw.choice([None, True, False, 0, 1, -1, 2, 0.5, "", "none", "auto"]),
        lambda: draw.choice([2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 1e308, 5e-324]),
        lambda: draw.choice([math.nan, math.inf, -math.inf, -0.0]),
        lambda: draw.choice(
            ["../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "\n", "\u202e", "*", "(a+)+$"]
        ),
        lambda: draw.choice("abcXYZ.*+(\\") * draw.choice([1, 30, 1000, 100_000]),
        lambda: draw.randint(-10, 100_000),
        lambda: draw.choice(
            [
                "(a|a)*b",
                "(.*)*(.*)*x",
                "(?P<n>",
                "[",
                ".*" * 12 + "x",
                "\\1(a)",
                "^(([a-z._0-9])+.)+X$",
            ]
        ),
    ]
    if depth:
        kinds.append(lambda: [odd_value(draw, depth - 1) for _ in range(draw.choice([0, 1, 3]))])
        kinds.append(
            lambda: {str(odd_value(draw, 0))[:50]: odd_value(draw, depth - 1) for _ in range(2)}
        )
        kinds.append(lambda: [draw.choice(["a", 1])] * draw.choice([100, 5000]))
    return draw.choice(kinds)()


def break_json(draw: random.Random, value: Any) -> Any:
    """The value with one to three of its parts exchanged, dropped, renamed or repeated."""
    root = {"": json.loads(json.dumps(value))}
    for _ in range(draw.choice([1, 1, 2, 3])):
        places = list(_places(root))
        holder, key = draw.choice(places[1:] or places)
        act = draw.randrange(6)
        if act == 0:
            holder.pop(key)
            if not root:
                return odd_value(draw)
        elif act == 1 and isinstance(holder, dict) and key:
            holder[_misspelled(draw, key)] = holder.pop(key)
        elif act == 2:
            holder[key] = [holder[key]]
        elif act == 3 and isinstance(holder, dict) and key:
            holder[str(odd_value(draw, 0))[:100]] = odd_value(draw)
        else:
            holder[key] = odd_value(draw)
    return root[""]


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in list(items):
        yield value, key
        if isinstance(part, dict | list):
            yield from _places(part)


def _misspelled(draw: random.Random, word: str) -> str:
    place = draw.randrange(len(word) + 1)
    letter = draw.choice(string.ascii_lowercase + "._A0")
    return word[:place] + draw.choice(["", letter]) + word[place + draw.choice([0, 1]) :]


def json_text(draw: random.Random, value: Any) -> bytes:
    """JSON, at times no more: cut, doubled, deeply nested, of another encoding."""
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    odd = draw.randrange(24)
    if odd == 0:
        return break_bytes(draw, text)
    if odd == 1:
        return b"[" * draw.choice([10, 100_000])
    if odd == 2:
        return text.replace(b"{", b'{"a":1,"a":2,', 1)
    if odd == 3:
        return text.replace(b"1", b"1" * draw.choice([50, 10_000]), 1)
    return text


def break_bytes(draw: random.Random, data: bytes) -> bytes:
    """Bytes flipped, cut out, put in, repeated or cut off."""
    broken = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        place = draw.randrange(len(broken) + 1)
        act = draw.randrange(6)
        if act == 0 and place < len(broken):
            broken[place] ^= 1 << draw.randrange(8)
        elif act == 1:
            del broken[place : place + draw.choice([1, 4, 100])]
        elif act == 2:
            broken[place:place] = draw.randbytes(draw.choice([1, 4, 100]))
        elif act == 3:
            broken[place:place] = broken[place : place + draw.choice([1, 10, 100])] * 3
        elif act == 4:
            del broken[place:]
        else:
            broken[:8] = draw.choice([2**63, 2**64 - 1, 0, 1, len(data), 2**32]).to_bytes(
                8, "little"
            )
    return bytes(broken)


# Files of a model's folder


def header(inputs: Inputs, draw: random.Random) -> Try:
    """model.safetensors, its header broken as JSON, or all of it as bytes."""
    folder = inputs.copy("base")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    if draw.random() < 0.6:
        length = int.from_bytes(data[:8], "little")
        text = json_text(draw, break_json(draw, json.loads(data[8 : 8 + length])))
        data = len(text).to_bytes(8, "little") + text + data[8 + length :]
    else:
        data = break_bytes(draw, data)
    file.write_bytes(data)

    def read() -> None:
        for stored in open_folder(folder).values():
            stored.read()

    return read


def index(inputs: Inputs, draw: random.Random) -> Try:
    """model.safetensors.index.json, and at times a shard that is a link."""
    folder = inputs.copy("shards")
    file = folder / "model.safetensors.index.json"
    file.write_bytes(json_text(draw, break_json(draw, json.loads(file.read_bytes()))))
    if draw.random() < 0.3:
        shard = folder / "model-00001-of-00003.safetensors"
        shard.unlink(missing_ok=True)
        shard.symlink_to(
            draw.choice(
                ["/etc/passwd", "/dev/zero", shard.name, "../base/model.safetensors", "nothing"]
            )
        )
    return lambda: open_folder(folder)


def config(inputs: Inputs, draw: random.Random) -> Try:
    """config.json of each family; one in ten is loaded with its weights."""
    folder = inputs.copy("base")
    sound = json.loads((folder / "config.json").read_text()) | {
        "model_type": draw.choice(["llama", "llama", "qwen2", "gemma2", "gpt2"]),
        "rope_scaling": draw.choice(
            [None, {"rope_type": draw.choice(["linear", "llama3", "yarn"]), "factor": 2.0}]
        ),
        **{
            "n_embd": 8,
            "n_head": 2,
            "n_layer": 2,
            "n_inner": 16,
            "sliding_window": 8,
            "use_sliding_window": True,
        },
    }
    (folder / "config.json").write_bytes(json_text(draw, break_json(draw, sound)))
    return (lambda: load(folder)) if draw.random() < 0.1 else (lambda: model_config(folder))


def adapter(inputs: Inputs, draw: random.Random) -> Try:
    """adapter_config.json, and at times the header of its tensors."""
    folder = inputs.copy(draw.choice(["lora", "dora", "vera"]))
    (
        folder / "manifest.json"
    ).unlink()  # which would refuse every change: a foreign folder has none
    file = folder / "adapter_config.json"
    sound = json.loads(file.read_text())
    if draw.random() < 0.3:
        sound["target_modules"] = draw.choice(
            [r".*\.(q_proj|up_proj)", odd_value(draw), "all-linear"]
        )
    file.write_bytes(json_text(draw, break_json(draw, sound)))
    if draw.random() < 0.2:
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(break_bytes(draw, weights.read_bytes()))
    return lambda: load_adapter(inputs.params, folder)


def tokenizer(inputs: Inputs, draw: random.Random) -> Try:
    """tokenizer.json and the files beside it, used if they can be read."""
    folder = inputs.home / "tokenizer_broken"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(inputs.home / "tokenizer", folder)
    name = draw.choice(
        ["tokenizer.json"] * 2 + ["tokenizer_config.json", "generation_config.json", "config.json"]
    )
    sound = json.loads((folder / name).read_text(encoding="utf-8"))
    if name == "tokenizer.json":
        part = draw.choice([key for key in sound if key != "model"] + ["model"])
        if part == "model" and draw.random() < 0.7:
            sound["model"] |= (
                break_json(
                    draw,
                    {k: v for k, v in sound["model"].items() if k not in ("vocab", "merges")}
                    or {"a": 1},
                )
                or {}
            )
        else:
            sound[part] = break_json(draw, sound[part]) if sound[part] else odd_value(draw)
    else:
        sound = break_json(draw, sound)
    (folder / name).write_bytes(json_text(draw, sound))

    def use() -> None:
        read = load_tokenizer(folder)
        read.decode(read.encode("Grüße aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa! 12 <|im_end|>"))

    return use


# Templates, data and configuration


def template(inputs: Inputs, draw: random.Random) -> Try:
    """Chat templates of a grammar, or a sound one with its bytes broken."""
    if draw.random() < 0.3:
        source = break_bytes(draw, TEMPLATE.encode()).decode("utf-8", "replace")
    else:
        source = "".join(statement(draw, 2) for _ in range(draw.randint(1, 3)))
    chosen = dataclasses.replace(inputs.tokenizer, chat_template=source)
    return lambda: encode_chat_with_mask(chosen, TALK)


def jsonl(inputs: Inputs, draw: random.Random) -> Try:
    """A file of examples, of each format, some of whose rows are broken."""
    sound: Any = draw.choice(
        [
            {"prompt": "a b", "completion": " c"},
            {"messages": TALK},
            {"text": "one two"},
            {"prompt": TALK[:2], "completion": TALK[2:]},
        ]
    )
    rows = [
        sound,
        break_json(draw, sound),
        break_json(draw, sound) if draw.random() < 0.3 else sound,
    ]
    draw.shuffle(rows)
    data = b"\n".join(json_text(draw, row) for row in rows)
    file = inputs.home / "rows.jsonl"
    file.write_bytes(break_bytes(draw, data) if draw.random() < 0.2 else data)
    chat = dataclasses.replace(inputs.tokenizer, chat_template=TEMPLATE)
    return lambda: prepare_examples(read_rows(file), chat, max_length=64, loss_on="completion")


def override(inputs: Inputs, draw: random.Random) -> Try:
    """Command lines of train: keys as they are or misspelled, values of every kind."""
    source = f"configs/sft.py:{draw.choice([*METHODS, 'lroa', ''])}"
    words = []
    for _ in range(draw.randint(1, 3)):
        key = draw.choice(list(flatten(load_config("configs/sft.py:lora"))))
        key = _misspelled(draw, key) if draw.random() < 0.3 else key
        key += draw.choice(["", "", "", ".q_proj", ".", "..a"])
        value = odd_value(draw)
        text = value if isinstance(value, str) else draw.choice([repr, json.dumps])(value)
        words.append(
            f"--config.{key}={draw.choice([text, text, '1e3', 'none', 'yes', 'a,b', '(', '[' * 5000])}"
        )
    return lambda: load_config(source, words)


def written(inputs: Inputs, draw: random.Random) -> Try:
    """The config.json of a run, broken."""
    sound = json.loads(to_json(load_config("configs/sft.py:lora")))
    text = json_text(draw, break_json(draw, sound)).decode("utf-8", "replace")
    return lambda: from_json(text)


KINDS: dict[str, Callable[[Inputs, random.Random], Try]] = {
    "header": header,
    "index": index,
    "config": config,
    "adapter": adapter,
    "tokenizer": tokenizer,
    "template": template,
    "jsonl": jsonl,
    "override": override,
    "written": written,
}


if __name__ == "__main__":  # the scripts beside it are run; this one is read
    argparse.ArgumentParser(description="The inputs of fuzz.py: run that.").parse_args()
