"""Writes the reference for the tests of jaxft.data with transformers and TRL (extra `reference`).

    python tests/data/golden/make_chat.py

tokenizer/  a byte-level BPE of 400 ids, trained on the texts below: <s> is put before every text
chat.json   templates, conversations, and what transformers makes of each pair
sft.json    rows, and what TRL's SFTTrainer makes of them: ids, labels (-100 where not trained)
"""

from __future__ import annotations

import json
import tempfile
import types
from pathlib import Path

import datasets
import tokenizers
import transformers
import trl

HERE = Path(__file__).parent
TURN = "{{ '<|im_start|>' + message['role'] + '\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
PLAIN = (
    "{% for message in messages %}"
    + TURN
    + "{{ message['content'] + '<|im_end|>' }}{{ '\\n' }}{% endfor %}"
    + PROMPT
)
MARKED = (
    "{% for message in messages %}" + TURN + "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}" + PROMPT
)
# Whitespace control, namespace, tojson, loop controls, a BOS of its own, the end of turn unmarked.
BUSY = """{{- bos_token }}
{%- set state = namespace(turns=0) %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- continue %}
    {%- endif %}
    {%- set state.turns = state.turns + 1 %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- message.content | trim }}
        {%- endgeneration %}
        {{- eos_token }}
    {%- else %}
        {{- '[' ~ state.turns ~ '] ' ~ {'role': message.role, 'é': message.content} | tojson }}
    {%- endif %}
{%- endfor %}
"""
CONVERSATIONS = {
    "one turn": [("user", "What is 2 + 2?"), ("assistant", "It is 4.")],
    "system and two turns": [
        ("system", "Answer briefly."),
        ("user", "name : Aromi | area : riverside"),
        ("assistant", "Aromi is by the river."),
        ("user", "And <|im_end|> the food?"),
        ("assistant", "It is a coffee shop."),
    ],
    "many bytes a character": [("user", "Grüße 🦊 你好"), ("assistant", "🦊🦊 é 你")],
    "assistant first": [("assistant", "  Hello! "), ("user", "Hi."), ("assistant", "")],
    "a tool between": [("user", "Add."), ("tool", "4"), ("assistant", "4")],
}
ROWS = {
    "strings": [
        {"prompt": "name : Aromi | area : riverside ->", "completion": " Aromi is by the river ."},
        {"prompt": "What is 2 + 2?", "completion": "4<|im_end|>"},
        {"prompt": "the riv", "completion": "er is Aromi"},
        {"prompt": "", "completion": "It is 4."},
        {"prompt": "no answer ", "completion": ""},
        {"prompt": "Grüße 🦊" * 9, "completion": "cut off"},
        {
            "prompt": "name : Aromi | area : riverside | ",
            "completion": "Aromi is by the river " * 4,
        },
    ],
    "messages": [
        {
            "prompt": [{"role": "user", "content": "What is 2 + 2?"}],
            "completion": [{"role": "assistant", "content": "It is 4."}],
        },
        {
            "prompt": [
                {"role": "system", "content": "Answer briefly."},
                {"role": "user", "content": "name : Aromi"},
            ],
            "completion": [
                {"role": "assistant", "content": "Aromi is by the river."},
                {"role": "user", "content": "more?"},
                {"role": "assistant", "content": "No."},
            ],
        },
    ],
    "text": [{"text": "Aromi is by the river ."}, {"text": "It is 4.<|im_end|>"}],
}
MAX_LENGTH = 48


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Trains and saves the tokenizer; generation ends at <|im_end|> or </s>."""
    texts = [text for turns in CONVERSATIONS.values() for turn in turns for text in turn] * 4
    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(texts, vocab_size=400, min_frequency=2, special_tokens=special)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=MARKED,
    )
    fast.save_pretrained(HERE / "tokenizer")
    generation = {"bos_token_id": 0, "eos_token_id": [4, 1]}
    (HERE / "tokenizer" / "generation_config.json").write_text(json.dumps(generation) + "\n")
    return transformers.AutoTokenizer.from_pretrained(HERE / "tokenizer")


def chat(tokenizer: transformers.PreTrainedTokenizerFast) -> dict:
    """What `apply_chat_template` makes of every conversation by every template."""
    templates = {"plain": PLAIN, "marked": MARKED, "busy": BUSY}
    cases = []
    for title, turns in CONVERSATIONS.items():
        messages = [{"role": role, "content": content} for role, content in turns]
        for name, template in templates.items():
            made = tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            prompt = tokenizer.apply_chat_template(
                messages[:1], chat_template=template, add_generation_prompt=True, return_dict=True
            )
            cases.append(
                {
                    "title": title,
                    "template": name,
                    "messages": messages,
                    "ids": made["input_ids"],
                    "mask": made["assistant_masks"],
                    "prompt_ids": prompt["input_ids"],
                }
            )
    texts = ["", " ", "Aromi is 4.", "<s>Aromi", "a<|im_end|>b </s>", "Grüße 🦊 你好\n\n x"]
    encodings = {text: tokenizer(text)["input_ids"] for text in texts}
    return {"templates": templates, "cases": cases, "encodings": encodings}


def sft(tokenizer: transformers.PreTrainedTokenizerFast) -> list[dict]:
    """What SFTTrainer's preparation, and nothing else of it, makes of the rows."""
    made = []
    for title, rows in ROWS.items():
        for loss_on in ("completion", "all"):
            trainer = types.SimpleNamespace(
                _tokenizer=tokenizer,
                completion_only_loss=loss_on == "completion",
                chat_template=PLAIN,
            )
            with tempfile.TemporaryDirectory() as folder:
                prepared = trl.SFTTrainer._prepare_dataset(
                    trainer,
                    datasets.Dataset.from_list(rows),
                    tokenizer,
                    trl.SFTConfig(
                        output_dir=folder, max_length=MAX_LENGTH, use_cpu=True, bf16=False
                    ),
                    packing=False,
                    formatting_func=None,
                    dataset_name="train",
                )
            made.append(
                {
                    "title": title,
                    "loss_on": loss_on,
                    "rows": rows,
                    "max_length": MAX_LENGTH,
                    "ids": list(prepared["input_ids"]),
                    "labels": list(prepared["labels"]),
                }
            )
    return made


def main() -> None:
    """Writes the three files."""
    tokenizer = make_tokenizer()
    for name, content in (("chat.json", chat(tokenizer)), ("sft.json", sft(tokenizer))):
        text = json.dumps(content, ensure_ascii=False)
        (HERE / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
