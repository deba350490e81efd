"""Writes what transformers and TRL make of conversations by the chat templates of several families.

    python tests/data/golden/make_styles.py            # styles.json, read by tests/data/test_styles.py
    python tests/data/golden/make_styles.py ALL.json   # the same of every template that TRL ships

The templates of jaxft/assets/templates stand beside the models' own, as TRL (Apache-2.0) ships them; those
called `..._training` mark what the assistant says. One tokenizer knows the special tokens of all.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import datasets
import transformers
import trl

HERE = Path(__file__).parent
OWN = HERE.parents[2] / "jaxft" / "assets" / "templates"
SHIPPED = Path(trl.__file__).parent / "chat_templates"
CHOSEN = (
    "gemma", "gemma_training", "llama3", "llama3_training", "llama3_1", "phi3", "phi3_training",
    "qwen2_5", "qwen2_5_training", "qwen3", "qwen3_training",
)  # fmt: skip
SPECIAL = {  # of a family: BOS, then what ends a turn
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<end_of_turn>"),
    "mistral": ("<s>", "</s>"),
    "phi3": ("<s>", "<|end|>"),
    "": ("<s>", "<|im_end|>"),
}
OTHERS = (
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<start_of_turn>", "<|user|>", "<|assistant|>",
    "<|system|>", "<|endoftext|>", "<tool_call>", "</tool_call>", "<think>", "</think>",
)  # fmt: skip
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            "required": ["a", "b"],
        },
    },
}


def turn(role: str, content: str | None = None, **keys: Any) -> dict[str, Any]:
    return {"role": role, **({} if content is None else {"content": content}), **keys}


def call(a: int, b: int) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", "arguments": {"a": a, "b": b}}}


ROWS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [turn("user", "What is 2 + 2?"), turn("assistant", "It is 4.")]},
    "several turns": {
        "messages": [
            turn("system", "Answer briefly."),
            turn("user", "Grüße 🦊, is 2 + 2 = 4?"),
            turn("assistant", "Yes: 4."),
            turn("user", "And 3 + 3?"),
            turn("assistant", "你好 6.\n"),
        ]
    },
    "a call": {
        "messages": [
            turn("user", "What is 2 + 2?"),
            turn("assistant", tool_calls=[call(2, 2)]),
            turn("tool", "4", name="add"),
            turn("assistant", "It is 4."),
        ],
        "tools": [ADD],
    },
    "words and two calls": {
        "messages": [
            turn("system", "Use the tools."),
            turn("user", "2 + 2 and 3 + 3?"),
            turn("assistant", "Two sums.", tool_calls=[call(2, 2), call(3, 3)]),
            turn("tool", "4", name="add"),
            turn("tool", "6", name="add"),
            turn("assistant", "4 and 6."),
            turn("user", "Thanks."),
            turn("assistant", "Gladly."),
        ],
        "tools": [ADD],
    },
    "tools that are not called": {
        "messages": [turn("user", "Hi."), turn("assistant", "Hello.")],
        "tools": [ADD],
    },
    "reasoning": {
        "messages": [
            turn("user", "What is 2 + 2?"),
            turn("assistant", "4.", reasoning_content="2 and 2 are 4."),
        ]
    },
}


def special_of(name: str) -> tuple[str, str]:
    return next(tokens for family, tokens in SPECIAL.items() if name.startswith(family))


def tokenizer_for(name: str) -> transformers.PreTrainedTokenizerFast:
    tokenizer = transformers.AutoTokenizer.from_pretrained(HERE / "tokenizer")
    words = [word for pair in SPECIAL.values() for word in pair]
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*words, *OTHERS})})
    tokenizer.bos_token, tokenizer.eos_token = special_of(name)
    return tokenizer


def rendered(name: str, template: str, row: dict[str, Any]) -> dict[str, Any]:
    """Ids, the mask where the template marks, and the ids of the prompt for the last turn."""
    tokenizer, settings = (
        tokenizer_for(name),
        {"chat_template": template, "tools": row.get("tools")},
    )
    marks = trl.chat_template_utils.has_generation_markers(template)
    try:
        made = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=marks, **settings
        )
        prompt = tokenizer.apply_chat_template(
            row["messages"][:-1], return_dict=True, add_generation_prompt=True, **settings
        )
    except Exception as error:
        return {"fails": str(error)[:80]}
    return {
        "ids": made["input_ids"],
        "mask": made["assistant_masks"] if marks else None,
        "prompt_ids": prompt["input_ids"],
    }


def labels(name: str, template: str, rows: list[dict[str, Any]]) -> list[list[int]]:
    """What SFTTrainer trains with assistant_only_loss."""
    tokenizer = tokenizer_for(name)
    # `datasets` takes the columns from the first row.
    uniform = [
        {**row, "tools": json.dumps(row["tools"]) if "tools" in row else None} for row in rows
    ]
    trainer = types.SimpleNamespace(
        _tokenizer=tokenizer, completion_only_loss=False, chat_template=template
    )
    with tempfile.TemporaryDirectory() as folder:
        prepared = trl.SFTTrainer._prepare_dataset(
            trainer,
            datasets.Dataset.from_list(uniform),
            tokenizer,
            trl.SFTConfig(
                output_dir=folder,
                max_length=None,
                use_cpu=True,
                bf16=False,
                assistant_only_loss=True,
            ),
            packing=False,
            formatting_func=None,
            dataset_name="train",
        )
    return list(prepared["labels"])


def main() -> None:
    """Writes the file."""
    datasets.disable_progress_bars()
    names = CHOSEN if len(sys.argv) == 1 else sorted(path.stem for path in SHIPPED.glob("*.jinja"))
    templates = {f"{path.stem} of jaxft": path.read_text() for path in sorted(OWN.glob("*.jinja"))}
    templates |= {name: (SHIPPED / f"{name}.jinja").read_text() for name in names}
    cases = [
        {"template": name, "row": title, **rendered(name, template, row)}
        for name, template in templates.items()
        for title, row in ROWS.items()
    ]
    content = {
        "templates": templates,
        "special": {name: special_of(name) for name in templates},
        "others": sorted({*OTHERS, *(word for pair in SPECIAL.values() for word in pair)}),
        "rows": ROWS,
        "cases": cases,
        "labels": {
            "qwen2_5_training": labels(
                "qwen2_5_training", templates["qwen2_5_training"], list(ROWS.values())
            )
        },
    }
    path = HERE / "styles.json" if len(sys.argv) == 1 else Path(sys.argv[1])
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
