"""Folders as `jaxft train` and `jaxft compare` leave them, without the training; and a page, read."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from jaxft.configuration import load_config
from jaxft.configuration.load import to_json

CONFIGS = Path(__file__).parents[3] / "configs"
HOSTILE = '</div><script>document.title="owned"</script><img src=x onerror=alert(1)>"\'&\x00\ud800'


def made(
    folder: Path, method: str = "lora", recipe: str = "sft", steps: int = 4, **more: object
) -> Path:
    """A run's folder."""
    settings = {"steps": steps, "data.eval": "held.jsonl", "eval_metrics": "exact"}
    config = load_config(f"{CONFIGS / recipe}.py:{method}", settings | dict(more))
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config))
    lines = []
    for step in range(1, steps + 1):
        numbers = {"loss": 3.0 / step, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 100}
        lines.append({"step": step, **numbers, "tokens_per_second": 200.0, "split": "train"})
    lines.append({"step": 0, "loss": 3.25, "exact": 0.0, "split": "eval"})
    lines.append({"step": steps, "loss": 0.8125, "exact": 0.375, "split": "eval"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [
        {"step": step, "prompt": "How many?", "completion": said, "reference": "Nine."}
        for step, said in ((0, "Hm."), (steps, "Nine."))
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    (folder / "adapter" / "manifest.json").write_text("{}")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(4094 + 1024 * (steps - 4)))
    facts = {"steps": steps, "parameters": 3_000_000, "trained_parameters": 245_760}
    facts |= {"weights_bytes": 12_000_000, "peak_bytes": 3 * 2**29, "device": "cpu", "devices": 1}
    (folder / "summary.json").write_text(json.dumps(facts))
    return folder


# (name, title, kind, signal, recipe, score, half the interval, parameters, bytes, memory, seconds, added tokens)
LEVERS = (
    ("prompt", "a plain prompt", "prompt", "none", "", 0.12, 0.03, 0, 0, None, 0.0, 0.0),
    ("examples", "examples in the prompt", "prompt", "examples", "", 0.31, 0.05, 0, 649, None, 0.0, 231.0),
    ("retrieval", "passages before the question", "retrieval", "none", "", 0.63, 0.05, 0, 48_231, None, 0.0, 169.0),
    ("lora", "LoRA", "adapter", "examples", "configs/sft.py:lora", 0.79, 0.04, 299_008, 1_205_120, 59_663_360,
     53.8, 0.0),
    ("vera", "VeRA", "adapter", "examples", "configs/sft.py:vera", 0.55, 0.06, 16_896, 70_144, 72_351_744, 60.2, 0.0),
    ("qlora", "LoRA over a base of 4 bits", "adapter", "examples", "configs/sft.py:qlora", 0.77, 0.05, 299_008,
     1_205_120, 41_363_040, 71.5, 0.0),
    ("dora", "DoRA", "adapter", "examples", "configs/sft.py:dora", 0.80, 0.04, 308_736, 1_247_232, 84_305_920,
     66.0, 0.0),
    ("raft", "LoRA that reads passages", "retrieval", "examples", "configs/sft.py:lora", 0.83, 0.04, 299_008, 1_253_351,
     59_663_360, 88.1, 169.0),
    ("dpo", "LoRA by preferences", "adapter", "preferences", "configs/dpo.py:lora", 0.58, 0.05, 299_008, 1_205_120,
     88_101_120, 120.4, 0.0),
)  # fmt: skip


def compared(folder: Path, runs: bool = True) -> Path:
    """A comparison's folder, of levers with made figures; with `runs` those of lora and dpo are there."""
    levers = [_lever(*row) for row in LEVERS]
    if runs:
        for lever in levers:
            if lever["name"] in ("lora", "dpo"):
                recipe = lever["recipe"].split("/")[1].split(".")[0]
                for name in lever["runs"]:
                    made(folder / name, recipe=recipe, steps=8)
    left = _lever(*LEVERS[-1])
    left = {key: left[key] for key in ("title", "kind", "signal", "recipe")}
    left |= {"name": "full", "title": "full tuning", "reason": "no time was left for it"}
    (folder).mkdir(exist_ok=True, parents=True)
    found = {
        "version": 1, "model": "tiny", "device": "1 cpu device", "done": True, "steps": 24, "batch_size": 8,
        "metric": {"name": "f1", "lower": False, "most": 1.0, "worth": 0.05},
        "rows": {"train": 108, "tuning": 12, "test": 240, "overlap": ["train.jsonl:3"]},
        "budget": 1800.0, "seconds": 1574.6, "price_per_hour": 0.0, "confidence": 0.95,
        "levers": [*levers, left],
        "verdict": {
            "sentences": [
                "Take lora: it scores 0.790 (0.750 to 0.830), and no lever beats it beyond its interval.",
                "raft would add 0.040 (-0.010 to 0.090) for 169 tokens more a request.",
            ],
            "told": "chosen", "chosen": "lora", "next": "raft", "more": None,
            "steps": ["Beside prompt: lora +0.67 (+0.61 to +0.73) beats it.", "No lever beats lora."],
        },
    }  # fmt: skip
    (folder / "comparison.json").write_text(json.dumps(found))
    return folder


def _lever(
    name: str, title: str, kind: str, signal: str, recipe: str, score: float, half: float,
    parameters: int, bytes_: int, memory: int | None, seconds: float, tokens: float,
) -> dict[str, Any]:  # fmt: skip
    def around(value: float, half: float) -> dict[str, Any]:
        return {"value": value, "low": value - half, "high": value + half, "n": 240}

    tuned = bool(recipe)
    rates = (1e-4, 3e-4, 1e-3) if tuned else ()
    tried = {"name": "held-out loss", "part": 0.25}
    return {
        "name": name, "title": title, "kind": kind, "signal": signal, "recipe": recipe, "reason": "",
        "score": around(score, half),
        "difference": None if name == "prompt" else around(score - 0.12, half) | {"verdict": "better", "more": None},
        "untouched": around(0.02, 0.01) if tuned else None,
        "parameters": parameters, "bytes": bytes_, "memory": memory, "planned": None,
        "tokens_per_second": 618.5 if tuned else None, "seconds": seconds, "search_seconds": 4 * seconds, "price": None,
        "added_tokens": tokens, "added_seconds": tokens / 1000,
        "changed": around(score - 0.5, half) | {"before": score} if kind == "retrieval" else None,
        "facts": "write new training rows and tune again" if tuned else "edit what the prompt says",
        "searched": [{"setting": {"rate": rate}, "value": 1e-4 / rate, **tried} for rate in rates],
        "setting": {"rate": 1e-3} if tuned else {},
        "seeds": [1, 2, 3], "scores": [score - 0.02, score, score + 0.02],
        "runs": [f"runs/{name}-seed{seed}" for seed in (1, 2, 3)] if tuned else [],
        "samples": [
            {"prompt": [{"role": "user", "content": "Jane makes cake 2 times. Each takes 54 minutes. How long?"}],
             "answer": "108 minutes" if score > 0.6 else "54", "reference": "108 minutes"},
        ],
    }  # fmt: skip


class Read(HTMLParser):
    """A page's elements, and the texts in them."""

    VOID = ("meta", "input", "br", "img", "link")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.feed(page)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        self.texts.append((where, data))
        if {"td", "th"} & set(self.open) and "small" not in self.open:
            self.tables[-1][-1][-1] += data.strip()

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of that name."""
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        """All that a reader sees."""
        return " ".join(text for where, text in self.texts if where not in ("style", "script"))
