"""Where rotary settings may stand in config.json. What wins was seen in transformers 5.23, whose frequencies were
compared for each kind, place and family (llama, qwen2, gemma2)."""

from __future__ import annotations

import pytest

from jaxft.errors import UserError
from jaxft.models.rope import PARTIAL, rope_settings, settings_of_kind

YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}
KEYS = ("rope_parameters", "rope_scaling")
ORIGINAL = "original_max_position_embeddings"


def read(**raw):
    settings = rope_settings({"model_type": "llama", **raw}, 10000.0, 2048)
    return settings["rope_theta"], dict(settings["rope_scaling"])


@pytest.mark.parametrize("place", KEYS)
@pytest.mark.parametrize("settings", [YARN, LLAMA3])
def test_an_original_length_at_the_top_overrules_the_one_inside(place, settings):
    inside = {place: settings | {ORIGINAL: 512}}
    assert read(**inside)[1][ORIGINAL] == 512
    assert read(**inside, **{ORIGINAL: 128})[1][ORIGINAL] == 128
    assert read(**{place: settings, ORIGINAL: 128})[1][ORIGINAL] == 128
    assert read(**inside, **{ORIGINAL: None})[1][ORIGINAL] == 512


@pytest.mark.parametrize("settings", [YARN, LLAMA3, {"rope_type": "longrope"}])
def test_an_original_length_that_is_nowhere_is_the_models(settings):
    assert read(rope_parameters=settings)[1][ORIGINAL] == 2048


@pytest.mark.parametrize("settings", [LINEAR, {"rope_type": "default"}])
def test_kinds_without_an_original_length_ignore_it(settings):
    assert read(rope_scaling=settings, original_max_position_embeddings=128) == read(
        rope_scaling=settings
    )


@pytest.mark.parametrize("place", KEYS)
@pytest.mark.parametrize("settings", [YARN, LLAMA3, LINEAR, {"rope_type": "default"}])
def test_a_theta_inside_goes_before_the_one_at_the_top(place, settings):
    assert read(**{place: settings | {"rope_theta": 5e5}}, rope_theta=2e4)[0] == 5e5
    assert read(**{place: settings}, rope_theta=2e4)[0] == 2e4
    assert read(**{place: settings})[0] == 10000.0


@pytest.mark.parametrize("place", KEYS)
def test_a_partial_factor_inside_goes_before_the_one_at_the_top_and_the_plain_kind_has_none(place):
    key = "partial_rotary_factor"
    assert read(**{place: LINEAR}, **{key: 0.5})[1][key] == 0.5
    assert read(**{place: LINEAR | {key: 1.0}}, **{key: 0.5})[1][key] == 1.0
    assert read(**{place: {"rope_type": "default", key: 0.5}}) == (10000.0, {})


def test_a_yarn_factor_of_null_is_the_ratio_of_the_two_lengths():
    settings = {"rope_type": "yarn", "factor": None, ORIGINAL: 512}
    assert read(rope_parameters=settings)[1]["factor"] == 4.0
    assert "factor" not in read(rope_parameters={"rope_type": "yarn"})[1]


def test_both_places_may_say_the_same():
    new = YARN | {"rope_theta": 1e6}
    old, whole = {"type": "yarn", "factor": 4}, YARN | {ORIGINAL: 2048}
    assert read(rope_parameters=new, rope_scaling=old, rope_theta=1e6) == (1e6, whole)
    assert read(rope_parameters=new, rope_scaling=None) == (1e6, whole)
    assert read(rope_parameters={}, rope_scaling=YARN, rope_theta=1e6) == (1e6, whole)


@pytest.mark.parametrize(
    "raw",
    [
        # as the card of a model says it, put into a config.json of transformers 5
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN},
        # transformers 5 would take a theta of 10000
        {"rope_parameters": YARN | {"rope_theta": 1e6}, "rope_scaling": YARN},
        {"rope_parameters": LINEAR | {"rope_theta": 1e6}, "rope_scaling": YARN},
    ],
)
def test_two_places_that_differ_are_refused_with_both_and_what_to_write(raw):
    with pytest.raises(UserError) as caught:
        read(**raw)
    message = str(caught.value)
    assert f"rope_parameters {raw['rope_parameters']} and rope_scaling {YARN}" in message
    assert (
        'write "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "yarn", "factor": 4.0} '
        "and take rope_scaling out" in message
    )


def test_settings_for_each_kind_of_layer_are_refused():
    nested = {"full_attention": YARN, "sliding_attention": LINEAR}
    with pytest.raises(UserError, match="settings of its own for full_attention, sliding_atten"):
        read(rope_parameters=nested)


def test_of_a_kind_of_layer_the_range_of_yarn_is_truncated_whatever_its_settings_say():
    """As in transformers, which looks for the word beside the kinds."""
    assert read(rope_parameters=YARN | {"truncate": False})[1]["truncate"] is False
    found = settings_of_kind({}, YARN | {"truncate": False}, 1e4, 2048)
    assert dict(found["rope_scaling"]) == YARN | {ORIGINAL: 2048}


def test_of_a_kind_of_layer_a_partial_factor_at_the_top_counts_where_it_has_none():
    part, kind = {"partial_rotary_factor": 0.25}, {"rope_type": "proportional"}
    for raw, items, expected in ((part, kind, 0.25), (part, kind | {PARTIAL: 0.5}, 0.5)):
        found = settings_of_kind(raw, items, 1e4, 2048)
        assert dict(found["rope_scaling"])[PARTIAL] == expected
    assert settings_of_kind(part, {"rope_type": "default"}, 1e4, 2048)["rope_scaling"] == ()
