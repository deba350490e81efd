"""The same numbers on every mesh: loss curves of one device, dropout and the data's order included."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxft
from jaxft.adaptation import partition
from jaxft.models import Config, Transformer
from jaxft.models.transformer import initial_params
from jaxft.training.feed import prepare_data
from jaxft.training.precision import with_dtypes
from jaxft.training.program import OnOwn, make_program, own_of
from jaxft.training.reference import make_reference
from jaxft.training.setup import prepare_model
from jaxft.training.sharding import make_mesh, shardings
from tests.small_runs import GOLDEN

pytestmark = pytest.mark.slow

STEPS = 3
PREFERENCES = str(Path(__file__).parents[2] / "configs" / "dpo.py")
METHODS: dict[str, dict[str, Any]] = {
    "full": {"optimizer.learning_rate": 1e-3},
    "lora": {"method.dropout": 0.1},
    "dora": {"remat": "dots"},
    "vera": {"remat": "full"},
    "qlora": {"base.group_size": 8},  # its scales are too few for eight devices, its codes are not
    "dpo": {"data.train": str(GOLDEN.parent / "preferences" / "pairs.jsonl")},
}
ALL = "fsdp=2 x context=2 x tensor=2"  # data and fsdp divide a batch alike
MESHES = {
    ALL: {"fsdp": 2, "context": 2, "tensor": 2},
    "data=2 x fsdp=2 x tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data=8": {"data": 8},
    "fsdp=8": {"fsdp": 8},
    "tensor=8": {"tensor": 8},
    "fsdp=4 x tensor=2": {"fsdp": 4, "tensor": 2},
    "context=4 x data=2": {"context": 4, "data": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose every dimension eight devices divide, its layers seeing far and near in turn."""
    config = Config(
        family="gemma2", vocabulary=384, hidden=32, intermediate=48, layers=2, heads=8, key_heads=8,
        head_dim=8, max_length=256, norm_place="both", norm_offset=1.0, activation="gelu_tanh",
        query_scale=0.3, attention_softcap=20.0, logit_softcap=20.0, windows=(40, 0), tied=True,
        embedding_scale=32**0.5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model") / "base"
    jaxft.save(Transformer(config), initial_params(config, jax.random.key(1)), folder)
    return folder


@functools.cache
def curve(configure: Any, folder: Path, method: str, mesh: str = "one") -> list[float]:
    """The losses of a few updates."""
    sizes = {"data": 1} | (MESHES[mesh] if mesh != "one" else {})
    row = "lora" if method == "dpo" else method
    config = configure(
        row,
        **({"recipe": PREFERENCES} if method == "dpo" else {}),
        **{f"mesh.{axis}": size for axis, size in sizes.items()},
        **{"model": str(folder), "tokenizer": str(GOLDEN / "model"), "batch_size": 8},
        **{"data.max_length": 128, "data.packing": True, "steps": STEPS},
        **METHODS[method],
    )
    config, placed = with_dtypes(config, jax.devices()[0]), make_mesh(config.mesh)
    with jax.set_mesh(placed):
        decoder, params, method_row = prepare_model(config, placed)
        feed = prepare_data(config, decoder.config, placed).train
        trainable, frozen = partition(params, method_row)
        reference = make_reference(config, decoder.config, trainable, placed)
        program = make_program(config, decoder.config, method_row, trainable, reference, STEPS)
        state = program.initial(trainable)
        update = jax.jit(program.update, out_shardings=(shardings(state, placed), None))
        step = OnOwn(update, own_of(config, STEPS))
        losses = []
        for _ in range(STEPS):
            batch = feed.next(None).arrays
            state, numbers = step(state, frozen, batch, *reference.held)
            losses.append(float(numbers["loss"]))
    return losses


def case(method: str, mesh: str) -> Any:
    """Codes on a mesh of all axes stand for the others."""
    stands = mesh == ALL and method == "qlora"
    return pytest.param(method, mesh, marks=[] if stands else [pytest.mark.thorough])


@pytest.mark.parametrize(
    ("method", "mesh"), [case(method, mesh) for method in METHODS for mesh in MESHES]
)
def test_every_mesh_gives_one_devices_curve(
    method: str, mesh: str, model: Path, configure: Callable[..., Any]
) -> None:
    """Losses of 8 simulated devices equal those of one, to 1e-5, and they move."""
    one = curve(configure, model, method)
    assert len(set(one)) == STEPS
    np.testing.assert_allclose(curve(configure, model, method, mesh), one, rtol=1e-5)


@pytest.fixture(scope="module")
def lending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gemma 4: two kinds of layers, the upper ones without keys of their own, and inputs for each layer."""
    full = (("head_dim", 16), ("rope_theta", 1e5), ("keys_are_values", True))
    wide = ("intermediate", 96)
    parts = (
        (1, ()),
        (1, full),
        (1, (wide, ("keys_from", 0))),
        (1, (*full, wide, ("keys_from", 1))),
    )
    config = Config(
        family="gemma4_text", vocabulary=384, hidden=32, intermediate=48, layers=4, heads=8, key_heads=8,
        head_dim=8, max_length=256, norm_place="both", query_key_norm="head", value_norm=True, windows=(40, 0, 40, 0),
        activation="gelu_tanh", layer_inputs=8, layer_vocabulary=384, layer_scalars=True, embedding_scale=32**0.5,
        tied=True, parts=parts,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model") / "lending"
    jaxft.save(Transformer(config), initial_params(config, jax.random.key(1)), folder)
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("mesh", [ALL, "data=2 x fsdp=2 x tensor=2"])
def test_segments_give_one_devices_curve_too(
    lending: Path, mesh: str, configure: Callable[..., Any]
) -> None:
    one = curve(configure, lending, "lora")
    assert len(set(one)) == STEPS
    np.testing.assert_allclose(curve(configure, lending, "lora", mesh), one, rtol=1e-5)
