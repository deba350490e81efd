"""Runs that learn from rewards: the loop of every other run, with batches that the policy makes itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxft.errors import UserError
from jaxft.objectives import rollouts
from jaxft.objectives.rewarding import REWARDING
from jaxft.training import policy
from jaxft.training.loop import train
from tests.small_runs import GOLDEN, Cut, adapter_of, cut_at, lines

RECIPE = str(Path(__file__).parents[2] / "configs" / "rl.py")
PROMPTS = [
    {"prompt": f"name: {name} | trade:", "letter": name[0]}
    for name in ("Ada", "Bo", "Cleo", "Dora", "Emil")
]
GRADERS = [
    {"type": "text_similarity", "name": "close", "evaluation_metric": "fuzzy_match"}
    | {"input": "{{ sample.output_text }}", "reference": "{{ item.letter }} the trade"},
    {"type": "string_check", "name": "letter", "operation": "ilike", "weight": 0.5}
    | {"input": "{{ sample.output_text }}", "reference": "{{ item.letter }}"},
]


def written(folder: Path, rows: list[dict[str, Any]], name: str = "prompts.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def small(configure: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """A run of few prompts: `small(**{"rollout.updates": 2})`."""

    def make(**overrides: Any) -> Any:
        keys = {
            "data.train": written(tmp_path, PROMPTS),
            "graders": GRADERS,
            "batch_size": 2,
            "rollout.group": 3,
            "rollout.max_new_tokens": 8,
            "data.max_length": 64,
            "steps": 4,
            "checkpoint.every": 1,
        }
        return configure(overrides.pop("method", "lora"), RECIPE, **(keys | overrides))

    return make


def journal(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "rollouts.jsonl").read_text().splitlines()]


def test_every_completion_is_written_with_its_reward_and_advantage(small, tmp_path):
    train(small(), tmp_path / "run")
    told, metrics = journal(tmp_path / "run"), lines(tmp_path / "run")
    assert [line["step"] for line in told] == [step for step in (1, 2, 3, 4) for _ in range(6)]
    for step, numbers in enumerate(metrics, start=1):
        own = [line for line in told if line["step"] == step]
        assert numbers["reward"] == pytest.approx(
            np.mean([line["reward"] for line in own]), abs=1e-5
        )
        assert numbers["completions/mean_length"] == np.mean([line["length"] for line in own])
        for group in (own[:3], own[3:]):
            assert len({line["prompt"] for line in group}) == 1
            assert sum(line["advantage"] for line in group) == pytest.approx(0.0, abs=1e-4)
        for line in own:
            parts = line["rewards"]
            assert line["reward"] == pytest.approx(parts["close"] + 0.5 * parts["letter"], abs=1e-5)
    # what the sampler and the training program say of the same tokens
    assert 0 < max(line["rollout/logp_difference"] for line in metrics) < 1e-5
    assert [line["rollout/mismatch"] for line in metrics] == [0] * 4


HOW = [
    {},
    *(
        pytest.param(keys, marks=pytest.mark.thorough)
        for keys in (
            {"rollout.ahead": 1},
            {"rollout.parts": 2},
            {"rollout.updates": 2, "grad_accum": 2, "rollout.top_k": 20},
            {"mesh.fsdp": 2, "mesh.tensor": 2},
        )
    ),
]


@pytest.mark.parametrize("how", HOW)
def test_exact_rollouts_are_the_trained_policys_whatever_the_sampler_draws(
    how, small, tmp_path, monkeypatch
):
    keys = {"steps": 2 if how else 1} | how
    train(small(**keys), tmp_path / "plain")
    before = policy.sample_rollouts

    def disturbed(config: Any, params: Any, prompts: Any, *rest: Any, **settings: Any) -> Any:
        off = prompts._replace(temperature=prompts.temperature * np.float32(1.5))
        return before(config, params, off, *rest, **settings)

    monkeypatch.setattr(policy, "sample_rollouts", disturbed)
    train(small(**keys | {"rollout.exact": True}), tmp_path / "exact")
    assert all(line["rollout/mismatch"] == 0 for line in lines(tmp_path / "plain"))
    assert all(line["rollout/mismatch"] > 0 for line in lines(tmp_path / "exact"))
    told, exact = journal(tmp_path / "plain"), journal(tmp_path / "exact")
    assert [line["completion"] for line in exact] == [line["completion"] for line in told]


@pytest.mark.thorough
@pytest.mark.parametrize("name", REWARDING)
def test_every_objective_runs_with_a_reference(name, small, tmp_path):
    beta = {"objective.beta": 0.1, "steps": 2}
    train(small(**{"objective.name": name} | beta), tmp_path / "run")
    first, second = lines(tmp_path / "run")
    assert np.isfinite([first["loss"], second["loss"], second["grad_norm"]]).all()
    assert second["grad_norm"] > 0
    if name not in ("rloo", "reinforce_pp"):
        assert first["kl"] == pytest.approx(0.0, abs=1e-6)  # the policy begins as its reference
        assert second["kl"] > 0


@pytest.mark.thorough
def test_the_reference_reads_a_batch_in_the_parts_of_an_update(small, tmp_path):
    for parts in (1, 2):
        keys = {"objective.beta": 0.1, "steps": 2, "grad_accum": parts}
        train(small(**keys), tmp_path / str(parts))
    whole, halves = (lines(tmp_path / str(parts))[-1] for parts in (1, 2))
    assert whole["kl"] > 0
    for name in ("kl", "loss", "grad_norm"):
        assert halves[name] == pytest.approx(whole[name], rel=1e-3)


KINDS = {
    "plain": {},
    "two passes": {"rollout.updates": 2},
    "ahead": {"rollout.ahead": 1},
    "in parts": {"rollout.parts": 2, "objective.beta": 0.1},
}


MOMENTS = [
    (kind, moment)
    if (kind, moment) == ("two passes", "update")
    else pytest.param(kind, moment, marks=pytest.mark.thorough)
    for kind in KINDS
    for moment in ("update", "rollout", "grading")
]


@pytest.mark.parametrize(("kind", "moment"), MOMENTS)
def test_a_run_that_dies_goes_on_with_the_same_bits(kind, moment, small, tmp_path, monkeypatch):
    """Whatever it was doing: sampling, judging or learning."""
    config = small(**KINDS[kind])
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        if moment == "update":
            cut_at(patch, 2)
        else:
            calls = iter(range(100))
            name = {"rollout": "_sampled", "grading": "_judging"}[moment]
            before = getattr(rollouts.Rollouts, name)

            def dying(*arguments: Any, **settings: Any) -> Any:
                if next(calls) == 3:
                    raise Cut
                return before(*arguments, **settings)

            patch.setattr(rollouts.Rollouts, name, dying)
            if kind == "two passes":  # which samples twice alone
                next(calls), next(calls)
        with pytest.raises(Cut):
            train(config, tmp_path / "cut")
    train(config, tmp_path / "cut")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert journal(tmp_path / "cut") == journal(tmp_path / "whole")
    ours, theirs = adapter_of(tmp_path / "cut"), adapter_of(tmp_path / "whole")
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)


def test_two_passes_learn_twice_from_the_same_rollouts(small, tmp_path):
    train(small(**{"rollout.updates": 2, "optimizer.learning_rate": 0.05}), tmp_path / "run")
    metrics = lines(tmp_path / "run")
    assert [line["step"] for line in journal(tmp_path / "run")] == [1] * 6 + [3] * 6
    assert metrics[0]["reward"] == metrics[1]["reward"]
    assert metrics[0]["rollout/logp_difference"] == metrics[1]["rollout/logp_difference"] < 1e-5
    assert metrics[0]["clip_ratio/region_mean"] == 0 < metrics[1]["clip_ratio/region_mean"]


def test_held_out_prompts_are_answered_and_graders_that_look_on_are_asked(small, tmp_path):
    graders = {"graders": GRADERS[:1], "held_out": GRADERS[1:]}
    held_out = written(tmp_path, PROMPTS[:3], "held_out.jsonl")
    keys = {
        "data.eval": held_out,
        "eval_every": 2,
        "steps": 2,
        "graders": json.dumps(graders),
        "checkpoint.best": True,
    }
    result = train(small(**keys), tmp_path / "run")
    before, after = lines(tmp_path / "run", "eval")
    assert {
        "reward",
        "held_out/reward",
        "rewards/close/mean",
        "completions/mean_length",
    } <= before.keys()
    assert 0 <= after["reward"] <= 1
    assert result.metrics["eval_reward"] == after["reward"]
    assert all(set(line["held_out"]) == {"letter"} for line in journal(tmp_path / "run"))


@pytest.mark.thorough
def test_truncated_answers_can_teach_nothing(small, tmp_path):
    keys = {"objective.mask_truncated": True, "rollout.max_new_tokens": 2, "steps": 1}
    train(small(**keys), tmp_path / "run")
    [numbers] = lines(tmp_path / "run")
    ended = [line["length"] for line in journal(tmp_path / "run") if not line["truncated"]]
    assert numbers["trained_tokens"] == sum(ended)
    assert numbers["completions/clipped_ratio"] == pytest.approx(1 - len(ended) / 6)


REFUSED = [
    ({"graders": ""}, "config.graders: give a JSON file"),
    ({"graders": "[{]"}, "config.graders: not JSON"),
    ({"graders": {"held_out": []}}, "graders, to learn from, are missing beside it"),
    (
        {"graders": [{"type": "regex", "pattern": "a", "reference": "{{ item.lettr }}"}]},
        "prompts.jsonl:1: .*'lettr'.*'letter'",
    ),
    ({"graders": [{"type": "function", "function": "no_such_module:f"}]}, "no_such_module"),
    ({"rollout.group": 1}, "config.rollout.group: dapo .* at least 2"),
    ({"rollout.max_new_tokens": 60}, r"prompts.jsonl:1: the prompt has \d+ tokens"),
    ({"objective.name": "sft"}, "another recipe"),
    ({"objective.name": "gpro"}, "grpo"),
    (
        {"objective.name": "rloo", "objective.scale": "none"},
        "config.objective.scale: rloo takes none",
    ),
    ({"objective.name": "remax", "objective.delta": 3.0}, "config.objective.delta"),
    ({"objective.delta": 1.1}, "config.objective.delta"),
    ({"rollout.ahead": 1, "rollout.updates": 2}, "config.rollout.ahead"),
    ({"data.packing": True}, "config.data.packing"),
    ({"rollout.top_p": 1.5}, "config.rollout.top_p"),
]


@pytest.mark.parametrize(("keys", "said"), REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(keys, said, small, tmp_path):
    with pytest.raises(UserError, match=said) as error:
        train(small(**keys), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_answer_that_nobody_can_judge_has_no_advantage(small, tmp_path):
    source = "def grade(sample, item):\n    return 'good' if item['letter'] == 'A' else len(sample['output_text'])\n"
    graders = [{"type": "python", "name": "mine", "source": source}]
    train(small(graders=graders, steps=3), tmp_path / "run")
    unjudged = [
        line for line in journal(tmp_path / "run") if line["prompt"] == PROMPTS[0]["prompt"]
    ]
    assert unjudged
    for line in unjudged:
        assert line["reward"] is None
        assert line["advantage"] == 0
        assert "returned str 'good', not a number" in line["unjudged"]["mine"]


def test_graders_that_can_judge_nothing_end_the_run(small, tmp_path):
    graders = [
        {"type": "python", "name": "mine", "source": "def grade(sample, item): return 'text'\n"}
    ]
    with pytest.raises(
        UserError, match=r"not one answer .* mine: it returned str 'text', not a number"
    ):
        train(small(graders=graders), tmp_path / "run")


@pytest.mark.thorough
def test_a_models_folder_judges(small, tmp_path):
    """A model of random weights gives no number, and the run says so."""
    messages = [{"role": "user", "content": "How good is this? {{ sample.output_text }}"}]
    judge = {
        "type": "score_model",
        "name": "judge",
        "model": str(GOLDEN / "model"),
        "input": messages,
    }
    judge["sampling_params"] = {"max_completions_tokens": 4}
    with pytest.raises(UserError, match="judge: the model's answer holds no result"):
        train(small(graders=[judge]), tmp_path / "run")
    train(small(graders=[*GRADERS, judge], steps=1), tmp_path / "other")
    assert all(line["rewards"]["judge"] is None for line in journal(tmp_path / "other"))
    assert all(line["reward"] is not None for line in journal(tmp_path / "other"))
