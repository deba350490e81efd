"""Training curves of TRL's SFTTrainer on a tiny llama: trl/.

    model/             the base, with a byte-level BPE tokenizer trained on this file's sentences
    data.jsonl         96 rows of prompt and completion; messages.jsonl: 96 of messages
    adapters/<name>/   the adapters that training starts from (PEFT's files)
    tokens.json        what TRL makes of the first rows, and of rows whose tokens merge over the
                       boundary between prompt and completion: input_ids, labels
    curves.json        name -> settings, start, data, losses, learning_rates, grad_norms, tokens

The sentences, and so the tokenizer, are this file's own. Rows come in the file's order, again and
again. `losses[n]` is the mean over the trained tokens of update n, before it; `learning_rates[n]`
the rate it used; `grad_norms[n]` the global norm before clipping; `tokens[n]` the trained tokens.

    python tests/golden/make_trl.py
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import peft.optimizers.lorafa
import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
)
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer

FOLDER = Path(__file__).parent / "trl"
ROWS, STEPS, VOCABULARY = 96, 20, 384
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, RATIO = 4, 8, 16
SPECIAL = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' }}{{ message['content'] }}{{ '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

BOUNDARY = [  # the prompt's last token and the completion's first merge when written together
    {"prompt": "the little har", "completion": "bour is quiet"},
    {"prompt": "a bak", "completion": "ery near the harbour"},
    {"prompt": "", "completion": "nothing was asked"},
    {"prompt": "end it yourself:", "completion": " gladly</s>"},
]

NAMES = ["Ada", "Bruno", "Clara", "Dilip", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas"]
TRADES = ["baker", "gardener", "carpenter", "teacher", "sailor", "weaver", "beekeeper", "printer"]
PLACES = ["the harbour", "the old mill", "the market", "the river", "the north gate", "the hill"]
GOODS = ["rye bread", "apples", "oak chairs", "rope", "wool", "honey", "maps", "candles"]
DAYS = ["Monday", "Wednesday", "Friday", "Saturday"]
ENDINGS = [
    "",
    " It rarely rains there.",
    " Few people know the way, but those who do come back every week.",
    " Ask early: by noon everything is gone.",
]


def facts(choose: random.Random) -> tuple[str, str, str, str, str]:
    return tuple(choose.choice(words) for words in (NAMES, TRADES, PLACES, GOODS, DAYS))


def pairs(seed: int = 0) -> list[dict[str, str]]:
    """Rows of prompt and completion, of varied length."""
    choose, rows = random.Random(seed), []
    for index in range(ROWS):
        name, trade, place, goods, day = facts(choose)
        prompt = f"name: {name} | trade: {trade} | place: {place}"
        sentence = f" {name} is a {trade} near {place}."
        if index % 3:
            prompt += f" | sells: {goods}"
            sentence = f" {name}, a {trade}, sells {goods} near {place}"
            sentence += f" on {day}." if index % 2 else "."
        rows.append({"prompt": f"{prompt} =", "completion": sentence + choose.choice(ENDINGS)})
    return rows


def conversations(seed: int = 1) -> list[dict[str, list[dict[str, str]]]]:
    """Rows of messages: with and without a system message, one turn or two."""
    choose, rows = random.Random(seed), []
    for index in range(ROWS):
        name, trade, place, goods, day = facts(choose)
        turns = [
            ("user", f"Where does {name} the {trade} work?"),
            ("assistant", f"Near {place}.{choose.choice(ENDINGS)}"),
        ]
        if index % 4 == 0:
            turns.insert(0, ("system", "Answer in a sentence or two."))
        if index % 2:
            turns += [("user", "And what is sold?"), ("assistant", f"Mostly {goods}, on {day}.")]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return rows


def write_lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE; the post-processor puts BOS in front and nothing at the end."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [row["prompt"] + row["completion"] for row in pairs()]
    texts += [message["content"] for row in conversations() for message in row["messages"]]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


@torch.no_grad()
def write_model() -> None:
    """The base folder. config.json and the chat template stand in their usual places."""
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.2 if "embed" in name else parameter.shape[-1] ** -0.5
        parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else scale * noise)
    model.save_pretrained(FOLDER / "model")
    (FOLDER / "model/generation_config.json").unlink(missing_ok=True)
    words.save_pretrained(FOLDER / "model", save_jinja_files=False)


def base() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        FOLDER / "model", dtype="float32", attn_implementation="eager"
    )


@torch.no_grad()
def write_adapters() -> None:
    """Starting points: as PEFT begins, but dora after a push, so that its norm matters."""
    shared = {"target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"}
    low_rank = {**shared, "r": RANK, "lora_alpha": ALPHA}
    configurations = {
        "lora": LoraConfig(**low_rank),
        "rslora": LoraConfig(**low_rank, use_rslora=True),
        "dora": LoraConfig(**low_rank, use_dora=True),
        "vera": VeraConfig(**shared, r=16, projection_prng_key=3),
    }
    for name, config in configurations.items():
        torch.manual_seed(0)
        model = get_peft_model(base(), config)
        generator = torch.Generator().manual_seed(1)
        for leaf, parameter in model.named_parameters() if name == "dora" else ():
            if "lora_B" in leaf:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "magnitude" in leaf:
                parameter *= 1 + 0.05 * torch.randn(parameter.shape, generator=generator)
        folder = FOLDER / "adapters" / name
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        file = folder / "adapter_config.json"
        stored = json.loads(file.read_text()) | {"base_model_name_or_path": "../../model"}
        stored["target_modules"] = sorted(stored["target_modules"])
        file.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")


SETTINGS = {
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "warmup_steps": 5,
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_length": 256,
    "packing": False,
    "completion_only_loss": None,
    "assistant_only_loss": False,
}


LOGGED = {  # of any trainer: float32 on the CPU, rows in their order, a line an update
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
}


def start_of(run: dict) -> PreTrainedModel | PeftModel:
    """The base, with the adapter that training starts from if there is one."""
    if run["start"] is None:
        return base()
    folder = FOLDER / "adapters" / run["start"]
    return PeftModel.from_pretrained(base(), folder, is_trainable=True)


def rows_of(file: Path, cache: str) -> Dataset:
    return load_dataset("json", data_files=str(file), split="train", cache_dir=cache)


def log_of(trainer: Trainer) -> list[dict]:
    """A line an update."""
    return [line for line in trainer.state.log_history if "loss" in line]


def runs() -> dict[str, dict]:
    """Name of the curve -> starting adapter (None: full tuning), and what differs from SETTINGS.

    The decay is far above what anyone uses: a smaller one would not show within 20 updates.
    """
    return {
        "lora": {"start": "lora"},
        "rslora": {"start": "rslora"},
        "dora": {"start": "dora"},
        "vera": {"start": "vera", "learning_rate": 3e-2},
        "lora_fa": {"start": "lora", "optimizer": "lora_fa"},
        "lora_fa_v2": {"start": "lora", "optimizer": "lora_fa_v2", "learning_rate": 5e-3},
        "lora_fa_v2_bf16": {"start": "lora", "optimizer": "lora_fa_v2_bf16", "learning_rate": 5e-3},
        "lora_plus": {"start": "lora", "optimizer": "lora_plus", "learning_rate": 1e-3},
        "full": {"start": None, "learning_rate": 1e-3},
        "lora_accumulated": {"start": "lora", "gradient_accumulation_steps": 2},
        "lora_decayed": {"start": "lora", "weight_decay": 2.0},
        "full_decayed": {"start": None, "learning_rate": 1e-3, "weight_decay": 5.0},
        "lora_cosine": {"start": "lora", "lr_scheduler_type": "cosine"},
        "lora_clipped": {"start": "lora", "max_grad_norm": 0.1},
        "lora_all_tokens": {"start": "lora", "completion_only_loss": False},
        "lora_messages": {"start": "lora", "data": "messages", "assistant_only_loss": True},
    }


def optimizer_of(name: str, model: PreTrainedModel, rate: float) -> torch.optim.Optimizer | None:
    """The optimizer that PEFT makes for the method; None leaves the Trainer's AdamW."""
    if name == "lora_fa":  # plain AdamW on lora_B alone
        for leaf, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_A" not in leaf)
    if name.startswith("lora_fa_v2"):
        return create_lorafa_optimizer(model, r=RANK, lora_alpha=ALPHA, lr=rate)
    if name == "lora_plus":
        return create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=RATIO, eps=1e-8
        )
    return None


class Counting(SFTTrainer):
    """SFTTrainer that also keeps the number of trained tokens of each update."""

    def get_batch_samples(self, *arguments: object, **named: object) -> tuple:
        batches, count = super().get_batch_samples(*arguments, **named)
        self.trained = [*getattr(self, "trained", []), int(count)]
        return batches, count


def trainer_for(run: dict, data: Dataset, output: str) -> Counting:
    settings = {key: run.get(key, value) for key, value in SETTINGS.items()}
    model = start_of(run)
    optimizer = optimizer_of(run.get("optimizer", ""), model, settings["learning_rate"])
    return Counting(
        model=model,
        args=SFTConfig(output_dir=output, **LOGGED, **settings),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(FOLDER / "model"),
        optimizers=(optimizer, None),
    )


def curve(run: dict, output: str) -> dict:
    """Train and read the log."""
    file = FOLDER / f"{run.get('data', 'data')}.jsonl"
    trainer = trainer_for(run, rows_of(file, output), output)
    # PEFT multiplies in bfloat16 wherever the machine has it: float32 unless the run says so
    half = run.get("optimizer") == "lora_fa_v2_bf16"
    with mock.patch.object(peft.optimizers.lorafa, "is_bf16_available", return_value=half):
        trainer.train()
    log = log_of(trainer)
    special = {"lora_plus": {"ratio": RATIO}, "lora_fa_v2": {"bfloat16": False}}
    special["lora_fa_v2_bf16"] = {"bfloat16": True}
    return {
        "start": f"adapters/{run['start']}" if run["start"] else None,
        "data": file.name,
        "optimizer": run.get("optimizer", "adamw"),
        "settings": {key: run.get(key, value) for key, value in SETTINGS.items()}
        | special.get(run.get("optimizer", ""), {}),
        "losses": [line["loss"] for line in log],
        "learning_rates": [line["learning_rate"] for line in log],
        "grad_norms": [line["grad_norm"] for line in log],
        "tokens": trainer.trained,
    }


def tokenized(rows: list[dict], output: str, **settings: object) -> list[dict]:
    """What TRL makes of the rows."""
    trainer = trainer_for({"start": None, **settings}, Dataset.from_list(rows), output)
    made = [{key: row[key] for key in ("input_ids", "labels")} for row in trainer.train_dataset]
    return [{"row": row, **tokens} for row, tokens in zip(rows, made, strict=True)]


def quiet() -> None:
    disable_progress_bar()
    disable_progress_bars()
    warnings.simplefilter("ignore")
    for library in ("transformers", "trl", "peft", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)


def main() -> None:
    quiet()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    write_lines(FOLDER / "data.jsonl", pairs())
    write_lines(FOLDER / "messages.jsonl", conversations())
    write_model()
    write_adapters()
    with tempfile.TemporaryDirectory() as output:
        tokens = {
            "completion": tokenized(pairs()[:6], output),
            "all": tokenized(pairs()[:2], output, completion_only_loss=False),
            "boundary": tokenized(BOUNDARY, output),
            "messages": tokenized(conversations()[:6], output, assistant_only_loss=True),
            "messages_all": tokenized(conversations()[:2], output),
        }
        (FOLDER / "tokens.json").write_text(json.dumps(tokens) + "\n")
        curves = {}
        for name, run in runs().items():
            curves[name] = curve(run, output)
            first, last = curves[name]["losses"][0], curves[name]["losses"][-1]
            print(f"{name}: loss {first:.4f} -> {last:.4f}")
    (FOLDER / "curves.json").write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    main()
