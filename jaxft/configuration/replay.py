"""A user's changes over another method's own defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxft.configuration import recipes
from jaxft.configuration.keys import conform, flatten, override, schema_of
from jaxft.configuration.load import load_config, pairs_of
from jaxft.configuration.rules import check
from jaxft.errors import UserError

Change = tuple[str, Any, bool]  # key, value, whether the value is text of a command line


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe, and what the user changed in it: recorded apart, so that both can be told for another method.

    >>> recipe = Recipe("configs/sft.py:lora", {"batch_size": 4, "method.alpha": 8.0})
    >>> full = recipe.for_method("full")
    >>> full.batch_size, full.optimizer.learning_rate, recipe.config().method.alpha
    (4, 2e-05, 8.0)

    Attributes:
        source, overrides: as of `load_config`.
    """

    source: str
    overrides: Sequence[str] | Mapping[str, Any] = ()

    def config(self) -> ConfigDict:
        """The configuration as `load_config` gives it."""
        return load_config(self.source, self.overrides)

    def for_method(self, name: str) -> ConfigDict:
        """The configuration that the recipe has for another method, with the user's changes.

        A change of a setting that the other method lacks, as full tuning lacks a rank, is left out.

        Raises:
            UserError: as `load_config`, or the recipe is of one method alone.
        """
        config = self.config()
        path, _ = recipes.split_source(self.source)
        if not path.endswith(".py"):
            return for_method(config, name)
        if name == config.method.name:
            return config
        file = recipes.find(path)
        made = conform(recipes.run(file, name, name), str(file))
        if made.method.name != name:
            raise UserError(
                f"--config {self.source}: the recipe gives {made.method.name} where {name} is asked for"
            )
        return _changed(made, pairs_of(self.overrides))


def for_method(config: ConfigDict, name: str) -> ConfigDict:
    """A configuration for another method: what differs from its recipe's defaults, over those of the other one."""
    if name == config.method.name:
        return config
    flat = flatten(config)
    before = flatten(schema_of(flat))
    made = schema_of(flat | {"method.name": name}).lock()
    changes = [(key, value, False) for key, value in flat.items() if value != before[key]]
    return _changed(made, changes)


def _changed(config: ConfigDict, changes: Iterable[Change]) -> ConfigDict:
    known = flatten(config)
    for key, value, is_text in changes:
        lacks = key.startswith("method.") and ".".join(key.split(".")[:2]) not in known
        if key != "method.name" and not lacks:
            override(config, key, value, is_text)
    check(flatten(config))
    return config
