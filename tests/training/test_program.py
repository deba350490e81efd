"""What `plan` compiles is what `train` runs: one function makes both, from shapes or from arrays."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxft.assets import model_folder
from jaxft.formats.config_file import model_config
from jaxft.planning.plan import _trace
from jaxft.training import loop
from jaxft.training.precision import with_dtypes
from jaxft.training.sharding import make_mesh
from tests.small_runs import GOLDEN, Cut

from .test_preferences import PAIRS, configured


def signature(tree: Any) -> list[tuple[str, tuple[int, ...], Any]]:
    """Path, shape and dtype of every leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path), leaf.shape, leaf.dtype) for path, leaf in leaves]


def taken(config: Any, folder: Path, patched: pytest.MonkeyPatch) -> Any:
    """The arguments of a run's first step: state, frozen, batch, *held."""
    caught: list[Any] = []

    def stop(run: Any, fed: Any) -> None:
        state, frozen, held = run.standing
        caught.append((state, frozen, fed.arrays, *held))
        raise Cut

    patched.setattr(loop.Loop, "dispatch", stop)
    with pytest.raises(Cut):
        loop.train(config, folder)
    return caught[0]


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {}),
        ("lora", {"objective.reference_every": 2}),
        ("lora", {"objective.precompute": True}),
        ("lora", {"objective.name": "orpo", "data.packing": True}),
        ("full", {"objective.reference_offload": True}),
        ("full", {"objective.reference": str(GOLDEN / "model")}),
    ],
    ids=["adapter", "moving", "precomputed", "free", "offloaded", "folder"],
)
def test_the_planned_step_takes_what_the_run_gives(
    method: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every leaf of state, frozen tree and reference; the batch but for lengths and slots, which data decide."""
    config = configured(method, **{"data.train": str(PAIRS / "pairs.jsonl"), **changes})
    config = with_dtypes(config, jax.devices()[0])
    state, frozen, batch, *held = taken(config, tmp_path, monkeypatch)
    shape = model_config(model_folder(config.model))
    model = dataclasses.replace(shape, dtype=config.dtype, remat=config.remat)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        planned = _trace(config, model, mesh)
        jax.eval_shape(planned.update, *planned.arguments)
    assert signature((planned.state, planned.frozen)) == signature((state, frozen))
    assert signature(planned.reference.held) == signature(tuple(held))
    kinds = [
        {name: (x.dtype, x.ndim) for name, x in tree.items()} for tree in (planned.batch, batch)
    ]
    assert kinds[0] == kinds[1]
    assert planned.batch["tokens"].shape == (config.batch_size, 2 * config.data.max_length)
