"""jaxft fine-tunes large language models in JAX: a method is a tree transform plus a partition."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxft import methods as methods
    from jaxft.adaptation import adapt as adapt
    from jaxft.adaptation import base_tree as base_tree
    from jaxft.adaptation import bind_dropout as bind_dropout
    from jaxft.adaptation import merge as merge
    from jaxft.adaptation import partition as partition
    from jaxft.comparison.compare import compare as compare
    from jaxft.configuration import load_config as load_config
    from jaxft.errors import UserError as UserError
    from jaxft.evaluation import evaluate as evaluate
    from jaxft.flax_modules import adapted as adapted
    from jaxft.formats import load as load
    from jaxft.formats import load_adapted as load_adapted
    from jaxft.formats import load_adapter as load_adapter
    from jaxft.formats import put_adapter as put_adapter
    from jaxft.formats import save as save
    from jaxft.formats import save_adapter as save_adapter
    from jaxft.formats import stack_adapters as stack_adapters
    from jaxft.inference import generate as generate
    from jaxft.inference import rollout as rollout
    from jaxft.objectives.baselines import advantages as advantages
    from jaxft.objectives.policy import policy_loss as policy_loss
    from jaxft.quantizing import quantize_params as quantize_params
    from jaxft.training.start import train as train
    from jaxft.tree import combine as combine
    from jaxft.weights import base_of as base_of
    from jaxft.weights import bind as bind
    from jaxft.weights import bind_groups as bind_groups
    from jaxft.weights import contract as contract
    from jaxft.weights import contract_transposed as contract_transposed
    from jaxft.weights import materialize as materialize
    from jaxft.weights import quantize as quantize
    from jaxft.weights import take as take

__version__ = "0.1.0"

# Where each public name stands. They are imported when first used, so that `jaxft --help` needs no JAX.
_HOMES = {
    "jaxft.adaptation": ("adapt", "base_tree", "bind_dropout", "merge", "partition"),
    "jaxft.comparison.compare": ("compare",),
    "jaxft.configuration": ("load_config",),
    "jaxft.errors": ("UserError",),
    "jaxft.evaluation": ("evaluate",),
    "jaxft.flax_modules": ("adapted",),
    "jaxft.formats": (
        "load",
        "load_adapted",
        "load_adapter",
        "put_adapter",
        "save",
        "save_adapter",
        "stack_adapters",
    ),
    "jaxft.inference": ("generate", "rollout"),
    "jaxft.objectives.baselines": ("advantages",),
    "jaxft.objectives.policy": ("policy_loss",),
    "jaxft.quantizing": ("quantize_params",),
    "jaxft.training.start": ("train",),
    "jaxft.tree": ("combine",),
    "jaxft.weights": (
        "base_of",
        "bind",
        "bind_groups",
        "contract",
        "contract_transposed",
        "materialize",
        "quantize",
        "take",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "methods"])


def __getattr__(name: str) -> Any:
    if name == "methods":
        return importlib.import_module("jaxft.methods")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'jaxft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
