"""`config.population`: from the command line, from Python, and back from config.json."""

from __future__ import annotations

import pytest

from jaxft.configuration import load_config
from jaxft.configuration.load import from_json, to_json
from jaxft.configuration.populations import members_of
from jaxft.errors import UserError


def load(text):
    return load_config("configs/sft.py:lora", [f"--config.population={text}"])


def test_a_list_of_what_members_have_of_their_own():
    config = load('[{"optimizer.learning_rate": 1e-4}, {"name": "b", "method.rank": 4}]')
    members = members_of(from_json(to_json(config)))
    assert {
        name: (one.optimizer.learning_rate, one.method.rank) for name, one in members.items()
    } == {
        "learning_rate=0.0001": (1e-4, 16),
        "b": (2e-4, 4),
    }
    assert all(member.population == () for member in members.values())


def test_a_mapping_is_a_grid_of_all_combinations():
    config = load('{"optimizer.learning_rate": [1e-4, 3e-4], "seed": [1, 2]}')
    members = members_of(from_json(to_json(config)))
    assert [(one.optimizer.learning_rate, one.seed) for one in members.values()] == [
        (1e-4, 1),
        (1e-4, 2),
        (3e-4, 1),
        (3e-4, 2),
    ]
    assert next(iter(members)) == "learning_rate=0.0001-seed=1"
    both = load('[{"grid": {"seed": [1, 2]}, "method.rank": 2}, {"method.rank": 8}]')
    assert [one.method.rank for one in members_of(both).values()] == [2, 2, 8]
    assert members_of(load("()")) == {}


def test_a_member_whose_values_are_no_name_is_called_by_its_number():
    assert list(members_of(load('[{"data.train": "a/b.jsonl"}, {"seed": 3}]'))) == ["0", "seed=3"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"optimizer.learning_rat": 1e-4}]', "nearest: config.optimizer.learning_rate"),
        ('[{"batch_size": 4}]', "config.batch_size is common to all members"),
        ('[{"model": "x"}]', "config.model is common to all members"),
        ('[{"steps": 3}]', "config.steps is common to all members"),
        ('[{"data.max_length": 4}]', "config.data.max_length is common to all members"),
        ("[3]", "takes mappings such as"),
        ('{"seed": 1}', "a grid takes a list of values"),
        ('[{"method.rank": "four"}]', "member rank=four: config.method.rank takes a whole number"),
        ('[{"method.rank": 0}]', "member rank=0: config.method.rank takes a number of at least 1"),
        ('[{"seed": 1}, {"seed": 1}]', "two members are called 'seed=1'"),
        ('[{"name": "a/b"}]', "'a/b' is no name"),
    ],
)
def test_what_is_no_population_is_refused_in_one_line(text, said):
    with pytest.raises(UserError, match=said):
        members_of(load(text))
