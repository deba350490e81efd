"""What the user changed, for another method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxft.configuration import Recipe, for_method, to_json
from jaxft.errors import UserError

WORDS = ["--config.batch_size=4", "--config.method.rank=3", "--config.optimizer.weight_decay=0.5"]


def seen(config: Any) -> tuple[Any, ...]:
    rank = config.method.rank if "rank" in config.method else None
    optimizer = config.optimizer
    return (
        config.method.name,
        rank,
        config.batch_size,
        optimizer.weight_decay,
        optimizer.learning_rate,
    )


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("lora", ("lora", 3, 4, 0.5, 2e-4)),
        ("vera", ("vera", 3, 4, 0.5, 4e-3)),
        ("full", ("full", None, 4, 0.5, 2e-5)),
    ],
)
def test_changes_stand_over_the_other_methods_defaults(
    tmp_path: Path, method: str, expected: tuple[Any, ...]
) -> None:
    """Of a recipe and its overrides; of a run's config.json, which tells changes from defaults itself."""
    recipe = Recipe("configs/sft.py:lora", WORDS)
    assert seen(recipe.for_method(method)) == expected
    (tmp_path / "config.json").write_text(to_json(recipe.config()))
    assert seen(Recipe(str(tmp_path / "config.json")).for_method(method)) == expected
    assert seen(for_method(recipe.config(), method)) == expected


def test_what_a_method_keeps_by_default_is_its_own() -> None:
    """The first method's rank is no change of the user's."""
    assert (
        Recipe("configs/sft.py:lora").for_method("vera") == Recipe("configs/sft.py:vera").config()
    )
    assert (
        Recipe("configs/dpo.py:dora").for_method("full") == Recipe("configs/dpo.py:full").config()
    )


def test_a_later_change_of_a_learning_rate_is_the_users() -> None:
    words = ["--config.optimizer.learning_rate=1e-3"]
    assert Recipe("configs/sft.py:lora", words).for_method("full").optimizer.learning_rate == 1e-3


def test_a_recipe_of_one_method_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from jaxft.configuration import recipe\n"
        "def get_config(size='small'):\n"
        "    return recipe('configs/sft.py', 'dora')\n"
    )
    with pytest.raises(UserError, match="gives dora where full is asked for"):
        Recipe(str(recipe)).for_method("full")
