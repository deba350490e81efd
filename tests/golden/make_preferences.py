"""Training curves of TRL's preference trainers on the tiny llama of make_trl.py: preferences/.

    pairs.jsonl        48 rows of prompt, chosen and rejected; judged.jsonl: 48 of prompt, completion and label
    messages.jsonl     48 pairs of messages
    curves.json        name -> settings of the trainer, start, data, and of each update: losses, rewards of chosen and
                       rejected completions, margins, kl (KTO), learning_rates, grad_norms
    tokens.json        what DPOTrainer makes of rows: prompt_ids, chosen_ids, rejected_ids

The base and the adapters are those of make_trl.py, which has to be run before. DPOTrainer and KTOTrainer are TRL's
own, ORPOTrainer and CPOTrainer (which is SimPO's too) its experimental ones. Rows come in the file's order.

    python tests/golden/make_preferences.py [NAME ...]     (only these curves anew)
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

import make_trl
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

FOLDER = Path(__file__).parent / "preferences"
ROWS = 48
TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
    "cpo": (CPOTrainer, CPOConfig),
}
OWN = {"learning_rate": 2e-3, "warmup_steps": 4, "max_length": 128, "beta": 0.1}
SAME = (
    "lr_scheduler_type", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay",
    "max_grad_norm", "optim",
)  # fmt: skip
SETTINGS = {key: make_trl.SETTINGS[key] for key in SAME} | OWN


def pairs(seed: int = 2) -> list[dict[str, str]]:
    """Prompts with a right and a wrong completion, of unequal length."""
    choose, rows = random.Random(seed), []
    for index in range(ROWS):
        name, trade, place, goods, day = make_trl.facts(choose)
        other = choose.choice([known for known in make_trl.PLACES if known != place])
        right = f" {name} is a {trade} near {place}." + choose.choice(make_trl.ENDINGS)
        wrong = f" {name}, who sells {goods}, lives near {other}" + choose.choice(
            ["", f" since {day}."]
        )
        prompt = f"name: {name} | trade: {trade} | place: {place} ="
        rows.append({"prompt": prompt, "chosen": right, "rejected": wrong})
        if index % 5 == 4:
            rows[-1]["rejected"] = " No."
    return rows


def judged() -> list[dict]:
    """One completion of each pair, with what is thought of it."""
    rows = []
    for index, row in enumerate(pairs(3)):
        good = index % 3 != 1
        rows.append(
            {
                "prompt": row["prompt"],
                "completion": row["chosen" if good else "rejected"],
                "label": good,
            }
        )
    return rows


def conversations() -> list[dict]:
    """The pairs as messages, some with a system message and turns before."""
    rows = []
    for index, row in enumerate(pairs(4)):
        prompt = [{"role": "user", "content": row["prompt"]}]
        if index % 3 == 0:
            prompt.insert(0, {"role": "system", "content": "Answer in a sentence."})
        if index % 4 == 0:
            prompt += [
                {"role": "assistant", "content": "Which one?"},
                {"role": "user", "content": "The last."},
            ]
        sides = {
            key: [{"role": "assistant", "content": row[key].strip()}]
            for key in ("chosen", "rejected")
        }
        rows.append({"prompt": prompt, **sides})
    return rows


def runs() -> dict[str, dict]:
    """Name of the curve -> trainer, starting adapter, and what differs from SETTINGS.

    The adapter `dora` is off the base: the reference then is that adapter, frozen.
    """
    plain = (
        "hinge",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
    )
    dpo = {
        "sigmoid": {},
        "ipo": {"loss_type": ["ipo"]},
        **{name: {"loss_type": [name]} for name in (*plain, "discopop", "sigmoid_norm")},
        "robust": {"loss_type": ["robust"], "label_smoothing": 0.2},
        "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.05},
        "aot_smoothed": {"loss_type": ["aot"], "label_smoothing": 0.1},
        "sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        "wpo": {"use_weighting": True},
        "forward_kl": {"f_divergence_type": "forward_kl"},
        "js": {"f_divergence_type": "js_divergence"},
        "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        "dora": {"start": "dora"},
        "full": {"start": None, "learning_rate": 2e-4},
        "synced": {
            "start": None, "learning_rate": 2e-4, "sync_ref_model": True, "ref_model_sync_steps": 4,
        },
        "accumulated": {"gradient_accumulation_steps": 2},
        "messages": {"data": "messages"},
    }  # fmt: skip
    others = {
        "kto": {"trainer": "kto", "data": "judged"},
        "kto_weighted": {
            "trainer": "kto", "data": "judged", "start": "dora",
            "desirable_weight": 0.6, "undesirable_weight": 1.3,
        },
        "orpo": {"trainer": "orpo"},
        "cpo": {"trainer": "cpo", "cpo_alpha": 1.0},
        "cpo_smoothed": {"trainer": "cpo", "cpo_alpha": 0.0, "label_smoothing": 0.1},
        "simpo": {"trainer": "cpo", "loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5},
    }  # fmt: skip
    return {
        name: {"trainer": "dpo", "start": "lora", "data": "pairs", **run}
        for name, run in (dpo | others).items()
    }


def curve(run: dict, output: str) -> dict:
    """Train and read the log."""
    trainer_class, arguments_class = TRAINERS[run["trainer"]]
    settings = SETTINGS | {
        key: value for key, value in run.items() if key not in ("trainer", "start", "data")
    }
    reference = {"ref_model": make_trl.base()} if run["start"] is None else {}
    trainer = trainer_class(
        model=make_trl.start_of(run),
        args=arguments_class(output_dir=output, **make_trl.LOGGED, **settings),
        train_dataset=make_trl.rows_of(FOLDER / f"{run['data']}.jsonl", output),
        processing_class=AutoTokenizer.from_pretrained(make_trl.FOLDER / "model"),
        **reference,
    )
    trainer.train()
    log = make_trl.log_of(trainer)
    names = {
        "losses": "loss", "learning_rates": "learning_rate", "grad_norms": "grad_norm", "chosen": "rewards/chosen",
        "rejected": "rewards/rejected", "margins": "rewards/margins", "kl": "kl", "accuracies": "rewards/accuracies",
    }  # fmt: skip
    found = {ours: [line.get(name) for line in log] for ours, name in names.items()}
    return {
        **{key: run[key] for key in ("trainer", "start", "data")},
        "settings": settings,
        **{
            name: values
            for name, values in found.items()
            if any(value is not None for value in values)
        },
    }


def tokenized(rows: list[dict], output: str) -> list[dict]:
    """What DPOTrainer makes of the rows."""
    trainer = DPOTrainer(
        model=make_trl.base(),
        args=DPOConfig(output_dir=output, bf16=False, use_cpu=True, report_to=[]),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(make_trl.FOLDER / "model"),
    )
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    made = [{key: row[key] for key in keys} for row in trainer.train_dataset]
    return [{"row": row, **tokens} for row, tokens in zip(rows, made, strict=True)]


BOUNDARY = [  # tokens merge over the boundary with one completion and not with the other
    {"prompt": "the little har", "chosen": "bour is quiet", "rejected": " no"},
    {"prompt": "a bak", "chosen": "er", "rejected": "ery near the harbour"},
    {"prompt": "end it yourself:", "chosen": " gladly</s>", "rejected": " no"},
]


def rounded(value: object) -> object:
    """Seven digits are enough, and keep the file small."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def main() -> None:
    make_trl.quiet()
    FOLDER.mkdir(exist_ok=True)
    for name, rows in {"pairs": pairs(), "judged": judged(), "messages": conversations()}.items():
        make_trl.write_lines(FOLDER / f"{name}.jsonl", rows)
    file = FOLDER / "curves.json"
    curves = json.loads(file.read_text()) if file.exists() and sys.argv[1:] else {}
    with tempfile.TemporaryDirectory() as output:
        for name, run in runs().items():
            if name in (sys.argv[1:] or runs()):
                curves[name] = rounded(curve(run, output))
                print(
                    f"{name}: loss {curves[name]['losses'][0]:.4f} -> {curves[name]['losses'][-1]:.4f}",
                    flush=True,
                )
        if not sys.argv[1:]:
            made = {
                "pairs": tokenized(pairs()[:4], output),
                "boundary": tokenized(BOUNDARY, output),
            }
            made["messages"] = tokenized(conversations()[:4], output)
            (FOLDER / "tokens.json").write_text(json.dumps(made) + "\n")
    file.write_text(json.dumps(curves) + "\n")


if __name__ == "__main__":
    main()
