"""`config.population`: runs that train together, each told by what it has of its own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxft.configuration.keys import assign, conform, flatten, override, unknown
from jaxft.configuration.values import GRID_KEY
from jaxft.errors import UserError, shown
from jaxft.tree import matches

# Keys in which members may differ: what one program over one base can hold as data.
OWN = (
    "seed",
    "method.rank",
    "method.alpha",
    "method.rank_stabilized",
    "method.targets",
    "method.rank_pattern",
    "method.alpha_pattern",
    "method.layers_to_transform",
    "method.d_initial",
    "method.projection_seed",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.decay_steps",
    "optimizer.final_fraction",
    "optimizer.weight_decay",
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.epsilon",
    "data.*",
)
COMMON = ("data.max_length", "data.packing")  # but not in these
NUMBERS = (
    "weight_decay",
    "b1",
    "b2",
    "epsilon",
)  # of the optimizer, which the program takes as data
LONGEST = 64  # letters of a member's name


def check_population(flat: Mapping[str, Any]) -> None:
    """Raises UserError for a `config.population` that is no list of mappings of keys in which members may differ."""
    for entry in flat["population"]:
        if not isinstance(entry, Mapping):
            raise UserError(
                f"config.population takes mappings such as {{'method.rank': 4}}, not {shown(entry)}"
            )
        grid = entry.get(GRID_KEY, {})
        if not isinstance(grid, Mapping) or not all(
            isinstance(values, (tuple, list)) and values for values in grid.values()
        ):
            raise UserError(
                f"config.population: a grid takes a list of values for each key, not {shown(grid)}"
            )
        for key in (*entry, *grid):
            if key not in ("name", GRID_KEY):
                _check_key(str(key).removeprefix("config."), flat)


def _check_key(key: str, flat: Mapping[str, Any]) -> None:
    if key not in flat:
        raise UserError(f"config.population: {unknown(key, flat)}")
    if key in COMMON or not any(
        matches(one.replace(".", "/"), key.replace(".", "/")) for one in OWN
    ):
        raise UserError(
            f"config.population: config.{key} is common to all members: they may differ in the seed, the method's "
            "rank, alpha and targets, the optimizer's rate, schedule and decay, and the data"
        )


def members_of(config: ConfigDict) -> dict[str, ConfigDict]:
    """{name: the configuration of a run of its own} of each member; {} where there is no population.

    Raises UserError for two members of one name, and for values that their keys do not take.
    """
    found: dict[str, ConfigDict] = {}
    for number, changes in enumerate(_each(config.population)):
        own = {key.removeprefix("config."): value for key, value in changes.items()}
        name = str(own.pop("name", "")) or _name_of(own, number)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]*", name):
            raise UserError(
                f"config.population: {shown(name)} is no name: letters, digits and . _ = + -"
            )
        if name in found:
            raise UserError(f"config.population: two members are called {name!r}")
        member = conform(config, "configuration")
        assign(member, "population", ())
        for key, value in own.items():
            try:
                override(member, key, value, False)
            except UserError as error:
                raise UserError(f"config.population: member {name}: {error}") from error
        found[name] = member
    _check_members(found)
    return found


def _check_members(members: Mapping[str, ConfigDict]) -> None:
    from jaxft.configuration.rules import check

    for name, member in members.items():
        try:
            check(flatten(member))
        except UserError as error:
            raise UserError(f"config.population: member {name}: {error}") from error


def _each(population: tuple[Mapping[str, Any], ...]) -> Iterator[dict[str, Any]]:
    """What each member has of its own, grids multiplied out."""
    for entry in population:
        own = {key: value for key, value in entry.items() if key != GRID_KEY}
        grid = entry.get(GRID_KEY, {})
        for values in itertools.product(*grid.values()):
            yield own | dict(zip(grid, values, strict=True))


def _name_of(own: Mapping[str, Any], number: int) -> str:
    """A name of what a member has of its own; its number where that is no name.

    >>> _name_of({"optimizer.learning_rate": 1e-4, "method.rank": 4}, 0), _name_of({"data.train": "a/b.jsonl"}, 1)
    ('learning_rate=0.0001-rank=4', '1')
    """
    parts = [f"{key.split('.')[-1]}={value}" for key, value in own.items()]
    name = "-".join(parts)
    fits = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]*", name) and len(name) <= LONGEST
    return name if fits else str(number)
