"""Learning from rewards: GRPO and its relatives. Every key of configs/sft.py, and those that rollouts and rewards need.

`configs/rl.py:dora` tunes with the method `dora`; `--config.objective.name=gspo` takes another loss. What is not said
here is as in configs/sft.py. Numbers that TRL's GRPOTrainer has as well are its own, but for the learning rate of
adapters. A batch is of `batch_size` prompts, each with `rollout.group` completions.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxft.configuration import recipe

# What a reward says is worth less than an example: a step goes less far.
LEARNING_RATES = {"full": 1e-6, "vera": 1e-3}
ADAPTER_LEARNING_RATE = 5e-5


def get_config(method: str = "lora") -> ConfigDict:
    """The whole configuration of a run that tunes with `method`, a row of `jaxft.methods`, by rewards."""
    config = recipe("configs/sft.py", method)
    config.objective = objective()
    config.rollout = rollout()
    # A JSON file of graders (jaxft/objectives/graders), or a list of them; to be given. An object {"graders": [...],
    # "held_out": [...]} has graders besides that only watch: a reward that rises alone is told.
    config.graders = ""
    config.optimizer.learning_rate = LEARNING_RATES.get(method, ADAPTER_LEARNING_RATE)
    config.epochs = 1.0
    config.eval_every = 50
    config.data.bad_rows = (
        "error"  # error | skip: leave out prompts that leave no room for an answer
    )
    return config


def objective() -> ConfigDict:
    """What is minimised: losses are explained in jaxft/objectives/policy.py."""
    keys = {
        # dapo | grpo | bnpo | dr_grpo | gspo | cispo | rloo | reinforce_pp | remax
        "name": "dapo",
        "epsilon": 0.0,  # ratios below 1 - epsilon are cut; 0.0: the paper's (0.2, gspo 3e-4)
        "epsilon_high": 0.0,  # and above 1 + this, cispo: above this; 0.0: the paper's (dapo 0.28, gspo
        # 4e-4, cispo 5), else epsilon
        "delta": 0.0,  # two-sided clipping: the largest ratio where an answer was bad; 0.0: none
        "beta": 0.0,  # weight of the KL to the reference; 0.0: no reference is asked
        "kl": "k3",  # its estimate, k1 | k2 | k3 (rloo and reinforce_pp take it off the reward)
        "kl_corrected": True,  # times the ratio, which keeps it unbiased off policy
        "importance": "token",  # ratios of a token | of a sequence (GSPO's)
        "scale": "group",  # whose deviation an advantage is divided by: group | batch | none
        "combine": "sum",  # several rewards: sum | normalize each (GDPO)
        "entropy_share": 1.0,  # learn from this share of the tokens, those of highest entropy; 1.0: all
        "mask_truncated": False,  # answers that reached max_new_tokens teach nothing
        # start: the policy as training begins (the adapter left out; the adapter that `config.adapter`
        # names, frozen; a frozen copy under full tuning). Else a model folder. Asked where beta is not 0.
        "reference": "start",
        "reference_every": 0,  # updates between two moves of the reference to the policy; 0: it stays
        "reference_mix": 0.6,  # share of the policy in such a move
        "reference_offload": False,  # full tuning: keep the frozen copy in the host's memory
    }
    return ConfigDict(keys)


def rollout() -> ConfigDict:
    """What is sampled, and how often it is learned from."""
    keys = {
        "group": 8,  # completions of a prompt
        "max_new_tokens": 256,  # of a completion
        "temperature": 1.0,  # of the draws; the loss is of the policy at this temperature
        "top_k": 0,  # draw among the k likeliest tokens; 0: all
        "top_p": 1.0,  # draw among the likeliest tokens that together have this probability; 1.0: all
        "slots": 0,  # completions that are continued at once; 0: chosen
        "parts": 1,  # parts of a batch sampled one after the other: one is graded while the next is sampled
        # True: tokens that training's program, which reads whole rows, would have drawn otherwise are exchanged, and
        # what follows is sampled again; False: they are counted alone (rollout/mismatch)
        "exact": False,
        "updates": 1,  # passes over a batch of rollouts
        "ahead": 0,  # 1: sample and grade the next batch while this one is learned from, by the policy before
        "eval_temperature": 0.0,  # of held-out answers; 0.0: the likeliest token each time
    }
    return ConfigDict(keys)
