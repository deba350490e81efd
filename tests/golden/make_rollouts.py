"""Four updates of TRL's GRPOTrainer on recorded rollouts, for some of its losses: rollouts.json.

    rollouts      of each batch: prompts (texts), completions (ids, 4 to a prompt), rewards
    settings      what all runs have in common
    curves        name -> the run's own settings, and of each update: loss, grad_norm, kl, clip_ratio/...

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
from trl import GRPOConfig, GRPOTrainer

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
}
KEPT = ("loss", "grad_norm", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
        "cispo_clip_ratio")  # fmt: skip


def recorded(seed: int = 0) -> list[dict[str, Any]]:
    """Batches of random ids: what is said does not matter, only that both learn from the same."""
    choose = random.Random(seed)
    lines = (FOLDER / "trl/data.jsonl").read_text().splitlines()
    texts = iter(dict.fromkeys(json.loads(line)["prompt"] for line in lines))

    def ids(least: int, most: int) -> list[int]:
        return [choose.randrange(6, VOCABULARY) for _ in range(choose.randint(least, most))]

    batches = []
    for _ in range(STEPS):
        completions = [ids(2, NEW) for _ in range(PROMPTS * GROUP)]
        completions = [each + [EOS] * (len(each) < NEW) for each in completions]
        rewards = [round(choose.random(), 3) for _ in completions]
        batches.append(
            {
                "prompts": [next(texts) for _ in range(PROMPTS)],
                "completions": completions,
                "rewards": rewards,
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

    with tempfile.TemporaryDirectory() as name:
        arguments = GRPOConfig(
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
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: current["rewards"],
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": f"{n}"} for n in range(PROMPTS * STEPS)]),
            processing_class=tokenizer,
            rollout_func=rollouts,
        )
        trainer.train()
        logged = [line for line in trainer.state.log_history if "grad_norm" in line]
    return [{key: line[key] for key in KEPT if key in line} for line in logged]


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
