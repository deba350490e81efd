"""Four updates of TRL's GRPOTrainer and RLOOTrainer on recorded rollouts, for some of their losses: rollouts.json.

    rollouts      of each batch: prompts (texts), completions (ids, 4 to a prompt), rewards (of two functions, a list
                  each; null where one cannot judge)
    settings      what all runs have in common
    curves        name -> the run's own settings, and of each update what TRL logs; the clock's numbers are left out

A run learns from the rewards of the first function, or of as many as it has weights.

The base is trl/model, trained whole. A completion without an EOS was cut off at the limit.

    python tests/golden/make_rollouts.py
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
FOLDER = Path(__file__).parent
STEPS, PROMPTS, GROUP, NEW, VOCABULARY, EOS = 4, 2, 4, 8, 384, 2
COMMON = {"learning_rate": 3e-3, "max_grad_norm": 1.0, "weight_decay": 0.0}
RUNS: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dapo, two passes": {"loss_type": "dapo", "num_iterations": 2},
    "grpo with KL": {"loss_type": "grpo", "beta": 0.1},
    "grpo with KL, two passes": {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1, "num_iterations": 2},
    "bnpo, without truncated": {"loss_type": "bnpo", "mask_truncated_completions": True},
    "dapo, tokens of high entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.5},
    "dapo, two rewards": {"loss_type": "dapo", "reward_weights": [1.0, 0.3], "scale_rewards": "batch"},
    "dapo, each reward normalized": {
        "loss_type": "dapo", "reward_weights": [1.0, 0.3], "multi_objective_aggregation": "normalize_then_sum",
    },
    "grpo, a reward that is not always known": {"loss_type": "grpo", "reward_weights": [0.0, 1.0]},
    "grpo, a reference that moves": {
        "loss_type": "grpo", "beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 2,
    },
    "grpo, warm, two-sided": {"loss_type": "grpo", "temperature": 0.7, "delta": 1.5, "num_iterations": 2},
    "rloo with KL, two passes": {"beta": 0.2, "num_iterations": 2},
}  # fmt: skip
LEFT_OUT = ("learning_rate", "num_tokens", "step_time", "epoch", "step")


def recorded(seed: int = 0) -> list[dict[str, Any]]:
    """Batches of random ids: what is said does not matter, only that both learn from the same."""
    choose, other = random.Random(seed), random.Random(seed + 1)
    lines = (FOLDER / "trl/data.jsonl").read_text().splitlines()
    texts = iter(dict.fromkeys(json.loads(line)["prompt"] for line in lines))

    def ids(least: int, most: int) -> list[int]:
        return [choose.randrange(6, VOCABULARY) for _ in range(choose.randint(least, most))]

    batches = []
    for _ in range(STEPS):
        completions = [ids(2, NEW) for _ in range(PROMPTS * GROUP)]
        completions = [each + [EOS] * (len(each) < NEW) for each in completions]
        first = [round(choose.random(), 3) for _ in completions]
        second = [other.choice([None, 0.0, 1.0, 2.0]) for _ in completions]
        batches.append(
            {
                "prompts": [next(texts) for _ in range(PROMPTS)],
                "completions": completions,
                "rewards": [first, second],
            }
        )
    return batches


def curve(batches: list[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, float]]:
    """What TRL logs of each update."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "trl/model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "trl/model")
    left = iter(batches)
    current: dict[str, Any] = {}

    def rollouts(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        current.update(next(left))
        asked = [tokenizer(text)["input_ids"] for text in current["prompts"] for _ in range(GROUP)]
        assert len(prompts) == len(asked)
        zeros = [[0.0] * len(ids) for ids in current["completions"]]
        return {"prompt_ids": asked, "completion_ids": current["completions"], "logprobs": zeros}

    def turn(*_: Any) -> list[list[int]]:
        current.update(next(left))
        return current["completions"]

    def first(completions: Any, **_: Any) -> list[float]:
        return current["rewards"][0]

    def second(completions: Any, **_: Any) -> list[float | None]:
        return current["rewards"][1]

    grouped = "loss_type" in settings
    rows = [{"prompt": text} for batch in batches for text in batch["prompts"]]
    with tempfile.TemporaryDirectory() as name:
        arguments = (GRPOConfig if grouped else RLOOConfig)(
            output_dir=name,
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=NEW,
            max_steps=STEPS,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            shuffle_dataset=False,
            disable_tqdm=True,
            seed=0,
            **COMMON,
            **settings,
        )
        trainer = (GRPOTrainer if grouped else RLOOTrainer)(
            model=model,
            reward_funcs=[first, second][: len(settings.get("reward_weights", [1.0]))],
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            **({"rollout_func": rollouts} if grouped else {}),
        )
        if not grouped:
            trainer._generate_single_turn = turn  # it has no `rollout_func`
        trainer.train()
        logged = [line for line in trainer.state.log_history if "grad_norm" in line]
    return [{key: line[key] for key in line if key not in LEFT_OUT} for line in logged]


def main() -> None:
    """Writes the file."""
    disable_progress_bars()
    disable_progress_bar()
    torch.set_num_threads(1)
    batches = recorded()
    curves = {name: {"settings": own, "updates": curve(batches, own)} for name, own in RUNS.items()}
    whole = {
        "rollouts": batches,
        "settings": {**COMMON, "group": GROUP, "new": NEW},
        "curves": curves,
    }
    text = json.dumps(whole, indent=1).replace("\n    ", " ").replace("\n   ]", " ]")
    (FOLDER / "rollouts.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
