"""What a plan says of sampling, scoring and the reference is what the run's own programs take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxft.configuration import load_config
from jaxft.inference import exact, rollouts
from jaxft.planning import plan
from jaxft.planning.report import table
from jaxft.planning.topology import local_devices
from jaxft.training import policy
from jaxft.training.loop import train
from tests.small_runs import GOLDEN, RECIPE
from tests.small_runs import promotion as promotion

pytestmark = pytest.mark.slow

GROUP, NEW, LENGTH = 3, 8, 40


def config_of(folder: Path, **overrides: Any) -> Any:
    (folder / "prompts.jsonl").write_text('{"prompt": "name: Ada | trade:"}\n' * 2)
    graders = [{"type": "regex", "pattern": "a", "input": "{{ sample.output_text }}"}]
    keys = {
        "model": str(GOLDEN / "model"),
        "data.train": str(folder / "prompts.jsonl"),
        "data.max_length": LENGTH,
        "graders": json.dumps(graders),
        "method.rank": 4,
        "batch_size": 2,
        "rollout.group": GROUP,
        "rollout.max_new_tokens": NEW,
        "objective.beta": 0.1,
        "steps": 1,
        "mesh.data": 1,
        "samples.count": 0,
    }
    return load_config(f"{RECIPE.replace('sft', 'rl')}:lora", keys | overrides)


def peak_of(lowered: Any) -> int:
    analysis = lowered.compile().memory_analysis()
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return int(held - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes)


def watched(program: Callable[..., Any], name: str, seen: dict[str, int]) -> Callable[..., Any]:
    """The jitted program, which tells the most memory that it takes."""

    def run(*arguments: Any, **settings: Any) -> Any:
        size = peak_of(program.lower(*arguments, **settings))  # type: ignore[attr-defined]
        seen[name] = max(seen.get(name, 0), size)
        return program(*arguments, **settings)

    return run


@pytest.mark.thorough
def test_the_runs_own_programs_take_what_was_planned(tmp_path, monkeypatch):
    config, seen = config_of(tmp_path), dict[str, int]()
    made = plan(config, local_devices())
    monkeypatch.setattr(rollouts, "run_slots", watched(rollouts.run_slots, "rollout", seen))
    monkeypatch.setattr(exact, "run_score", watched(exact.run_score, "score", seen))
    before = policy.reference_program
    monkeypatch.setattr(
        policy, "reference_program", lambda *given: watched(before(*given), "reference", seen)
    )
    train(config, tmp_path / "run")
    assert made.rollout_bytes == pytest.approx(seen["rollout"], rel=0.05)
    assert made.score_bytes == pytest.approx(seen["score"], rel=0.05)
    # the policy's adapter is no argument of the reference's program, and stands beside it
    assert made.reference_bytes == pytest.approx(seen["reference"] + made.adapter_bytes, rel=0.05)
    line = table([made])[-1]
    assert all(word in line for word in ("sampling", "keys and values", "scoring", "reference"))


def test_the_cache_holds_each_prompt_once(tmp_path):
    """2 (keys and values) x layers x heads x head size x 4 bytes, for P + slots x (N - 1) positions."""
    config = config_of(tmp_path, **{"objective.beta": 0.0, "rollout.slots": 4})
    made = plan(config, local_devices())
    shape = json.loads((GOLDEN / "model" / "config.json").read_text())
    head = shape["hidden_size"] // shape["num_attention_heads"]
    each = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head * 4
    assert made.cache_bytes == each * (2 * (LENGTH - NEW) + 4 * (NEW - 1))
    assert made.reference_bytes == 0
    assert made.rollout_bytes > made.base_bytes + made.adapter_bytes + made.cache_bytes
