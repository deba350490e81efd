"""The configuration of a run: reading it, overriding its keys, checking it, writing it.

It has two levels: keys (`batch_size`) and keys of a section (`optimizer.learning_rate`). A dict
below them is a value like any other (`method.rank_pattern`): its keys are the user's own.
`configs/sft.py` says which keys there are, and holds every default.
"""

from jaxft.configuration.keys import flatten
from jaxft.configuration.load import difference, from_json, load_config, to_json
from jaxft.configuration.recipes import recipe
from jaxft.configuration.replay import Recipe, for_method
from jaxft.configuration.rules import validate

__all__ = [
    "Recipe",
    "difference",
    "flatten",
    "for_method",
    "from_json",
    "load_config",
    "recipe",
    "to_json",
    "validate",
]
