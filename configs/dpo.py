"""Preference tuning: DPO and its relatives. Every key of configs/sft.py, and those that a preference needs.

`configs/dpo.py:dora` tunes with the method `dora`; `--config.objective.name=ipo` takes another loss. What
is not said here is as in configs/sft.py. Numbers that TRL's DPOTrainer has as well are its own.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxft.configuration import recipe

# The base's behaviour is to be kept: a tenth of what supervised fine-tuning takes and less.
LEARNING_RATES = {"full": 1e-6, "vera": 5e-4}
ADAPTER_LEARNING_RATE = 1e-5


def get_config(method: str = "lora") -> ConfigDict:
    """The whole configuration of a run that tunes with `method`, a row of `jaxft.methods`, on preferences."""
    config = recipe("configs/sft.py", method)
    config.objective = objective()
    config.optimizer.learning_rate = LEARNING_RATES.get(method, ADAPTER_LEARNING_RATE)
    config.epochs = 1.0
    config.data.bad_rows = "error"  # error | skip: leave out rows that cannot be used, counted
    config.data.share_prompt = True  # chosen and rejected behind one copy of their prompt
    return config


def objective() -> ConfigDict:
    """What is minimised: losses are explained in jaxft/objectives/preference.py."""
    keys = {
        # dpo | ipo | hinge | robust | cdpo | exo_pair | nca_pair | bco_pair | sppo_hard | aot |
        # aot_unpaired | apo_zero | apo_down | discopop | sigmoid_norm | simpo | cpo | orpo | kto
        "name": "dpo",
        "beta": 0.1,  # how strongly the policy is held to the reference; ipo's tau, orpo's lambda
        "label_smoothing": 0.0,  # probability of a wrong label: cdpo, robust, exo_pair, aot, simpo, cpo
        "length_normalize": False,  # means over a completion's tokens for sums; TRL's ipo has True
        "gamma": 0.5,  # simpo: the margin of rewards that is aimed at
        "tau": 0.05,  # discopop: temperature of the modulation
        "sft_weight": 0.0,  # of -log p of the chosen completions, a mean over tokens, added to the loss
        "f_divergence": "reverse_kl",  # reverse_kl | forward_kl | js | alpha: losses of the difference
        "alpha": 0.5,  # f_divergence=alpha: its coefficient
        "wpo": False,  # weigh pairs by how likely the policy is to say them (WPO)
        "desirable_weight": 1.0,  # kto: of desirable completions
        "undesirable_weight": 1.0,  # kto: of undesirable ones
        # start: the policy as training begins (the adapter left out; the adapter that `config.adapter`
        # names, frozen; a frozen copy under full tuning). none: no reference. Else a model folder.
        "reference": "start",
        "reference_every": 0,  # updates between two moves of the reference to the policy; 0: it stays
        "reference_mix": 0.6,  # share of the policy in such a move (TR-DPO's alpha); EMA: every 1, mix 0.01
        "reference_offload": False,  # full tuning: keep the frozen copy in the host's memory
        "precompute": False,  # the reference's log-probabilities in one pass before training, kept in RUN
    }
    return ConfigDict(keys)
