from __future__ import annotations

import inspect

import pytest

from jaxft import methods
from jaxft.errors import UserError
from jaxft.methods import METHODS, SETTINGS, defaults


@pytest.mark.parametrize("name", METHODS)
def test_a_row_accepts_each_of_its_own_defaults(name):
    assert METHODS[name](**defaults(name)) is not None
    assert METHODS[name]().name == name


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_short_and_says_where_it_comes_from(name):
    source = inspect.getsource(METHODS[name])
    assert len(source.splitlines()) <= 25
    assert METHODS[name].__doc__


def test_the_table_as_in_the_literature():
    rows = {name: METHODS[name]() for name in METHODS}
    assert {name: row.trainable for name, row in rows.items()} == {
        "full": ("*",),
        "lora": ("a", "b"),
        "rslora": ("a", "b"),
        "lora_plus": ("a", "b"),
        "lora_fa": ("b",),
        "lora_fa_v2": ("b",),
        "vera": ("d", "g"),
        "dora": ("a", "b", "magnitude"),
        "delta_lora": ("a", "b"),
    }
    assert [name for name, row in rows.items() if row.rank_stabilized] == ["rslora"]
    assert rows["lora_plus"].learning_rates == (("b", 16.0),)
    assert rows["lora_fa_v2"].precondition is not None
    assert rows["full"].transform is None


def test_settings_replace_defaults():
    method = methods.dora(rank=4, trainable=("b", "magnitude"), rank_stabilized=True)
    assert (method.rank, method.trainable) == (4, ("b", "magnitude"))
    assert method.rank_stabilized
    assert methods.lora_plus(ratio=4.0).learning_rates == (("b", 4.0),)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_an_unknown_setting_is_named_with_the_nearest(name):
    with pytest.raises(UserError, match=rf"method {name}: unknown setting 'rnk' \(nearest: 'rank'"):
        METHODS[name](rnk=4)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("vera", {"alpha": 1.0}),
        ("vera", {"rank_pattern": {"q": 1}}),
        ("vera", {"rank_stabilized": True}),
        ("delta_lora", {"dropout": 0.1}),
    ],
)
def test_a_setting_that_the_paper_excludes_is_refused_with_the_reason(name, setting):
    (key,) = setting
    assert key in SETTINGS
    assert key not in defaults(name)
    with pytest.raises(UserError, match=f"method {name} takes no {key}: (the paper|all layers)"):
        METHODS[name](**setting)


def test_a_part_that_the_weight_lacks_is_refused():
    with pytest.raises(
        UserError, match=r"method dora: no part 'magnitud' to train \(nearest: 'magni"
    ):
        methods.dora(trainable=("b", "magnitud"))


def test_an_unknown_method_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown method 'dorra' \(nearest: 'dora'"):
        methods.row_of("dorra")
    with pytest.raises(UserError, match=r"unknown method 'zzz' \(known: full, lora, "):
        methods.row_of("zzz")


def test_delta_lora_with_a_start_step_asks_for_one_event():
    assert methods.delta_lora().events == ()
    assert [step for step, _ in methods.delta_lora(start_step=3).events] == [3]


@pytest.mark.parametrize(("name", "part"), [("lora", "dropout"), ("lora", "key"), ("vera", "a")])
def test_what_is_no_leaf_of_the_weight_cannot_train(name, part):
    with pytest.raises(UserError, match=f"method {name}: no part '{part}' to train"):
        METHODS[name](trainable=(part,))


def test_a_lone_name_is_a_list_of_one():
    assert METHODS["lora"](targets="q_proj").targets == ("q_proj",)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": 0}, "rank takes a whole number from 1, not 0"),
        ({"rank": 2.5}, "rank takes a whole number from 1, not 2.5"),
        ({"rank": True}, "rank takes a whole number"),
        ({"alpha": 0}, "alpha takes a number above 0, not 0"),
        ({"alpha": float("nan")}, "alpha takes a number above 0, not nan"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern takes a mapping"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern takes a mapping"),
        ({"dropout": 1.0}, "dropout takes a rate of at least 0 and below 1, not 1.0"),
        ({"dtype": "bfloat"}, "dtype 'bfloat' is not known .nearest: 'bfloat16'"),
        ({"targets": 3}, "targets takes a list of patterns, not 3"),
        ({"layers_to_transform": ("a",)}, "layers_to_transform takes a list of layers"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_when_it_is_given(settings, says):
    for method in (methods.lora, methods.dora):
        with pytest.raises(UserError, match=rf"method {method.__name__}: {says}"):
            method(**settings)


def test_a_setting_by_pefts_name_is_told_ours():
    with pytest.raises(UserError, match="method lora: unknown setting 'r'; here it is 'rank'"):
        methods.lora(r=8)
    assert set(methods.PEFT.values()) <= set(methods.SETTINGS)
