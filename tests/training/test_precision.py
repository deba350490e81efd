"""`auto` for dtype and param_dtype."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from jaxft.configuration import difference, load_config, to_json
from jaxft.errors import UserError
from jaxft.training.precision import with_dtypes, with_runs_dtypes

DEVICES = {
    "cpu": types.SimpleNamespace(platform="cpu"),
    "tpu": types.SimpleNamespace(platform="tpu"),
    "turing": types.SimpleNamespace(platform="gpu", compute_capability="7.5"),
    "ampere": types.SimpleNamespace(platform="gpu", compute_capability="8.0"),
    "rocm": types.SimpleNamespace(platform="gpu"),
}


def settled(recipe: str, device: str, **overrides: Any) -> tuple[str, str]:
    config = load_config(recipe, {"dtype": "auto", "param_dtype": "auto", **overrides})
    found = with_dtypes(config, DEVICES[device])
    assert (config.dtype, config.param_dtype) == (
        overrides.get("dtype", "auto"),
        overrides.get("param_dtype", "auto"),
    )
    return found.dtype, found.param_dtype


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", "float32"),
        ("tpu", "bfloat16"),
        ("turing", "float32"),
        ("ampere", "bfloat16"),
        ("rocm", "float32"),
    ],
)
def test_a_frozen_base_is_held_as_it_is_multiplied(device: str, expected: str) -> None:
    assert settled("configs/sft.py:lora", device) == (expected, expected)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [("configs/sft.py:full", {}), ("configs/sft.py:lora", {"method.train_also": ("*_norm",)})],
)
def test_what_trains_of_the_base_is_float32(recipe: str, overrides: dict[str, Any]) -> None:
    assert settled(recipe, "tpu", **overrides) == ("bfloat16", "float32")


def test_a_run_keeps_the_dtypes_that_it_began_with(tmp_path: Path) -> None:
    """Here without a device that multiplies bfloat16 fast; another device would not change them."""
    config = load_config("configs/sft.py:lora", {"dtype": "auto", "param_dtype": "auto"})
    assert with_runs_dtypes(config, tmp_path).dtype == "float32"
    begun = with_dtypes(config, DEVICES["tpu"])
    (tmp_path / "config.json").write_text(to_json(begun))
    found = with_runs_dtypes(config, tmp_path)
    assert difference(begun, found) == []


@pytest.mark.parametrize(
    ("recipe", "key"), [("lora", "dtype"), ("full", "dtype"), ("full", "param_dtype")]
)
def test_no_gradient_is_in_float16(recipe: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"config\.{key}: gradients vanish in float16"):
        load_config(f"configs/sft.py:{recipe}", {key: "float16"})
    assert load_config("configs/sft.py:lora", {"param_dtype": "float16"}).param_dtype == "float16"


def test_what_is_said_holds() -> None:
    assert settled("configs/sft.py:full", "tpu", param_dtype="bfloat16") == ("bfloat16", "bfloat16")
    assert settled("configs/sft.py:lora", "tpu", dtype="float32") == ("float32", "bfloat16")
