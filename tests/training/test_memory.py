"""A run says what memory its step needs, and what to do where that is more than there is, before it makes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxft.errors import UserError
from jaxft.training import memory
from jaxft.training.loop import train
from jaxft.training.memory import Need, needed, refused, remedies, require_room
from jaxft.training.sharding import make_mesh
from tests.small_runs import lines

GIB = 2**30


def test_a_step_that_is_weighed_is_compiled_once(configure: Callable[..., Any]) -> None:
    """The call after it finds the program; its arguments, results and temporaries are counted."""
    mesh, made = make_mesh(configure().mesh), list[str]()

    def heard(event: str, _: float, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            made.append(event)

    with jax.set_mesh(mesh):
        square, other = jax.block_until_ready((jnp.ones((256, 256)), jnp.zeros((256, 256))))
        step = jax.jit(lambda x, y: (x @ y @ x, jnp.sum(y)), donate_argnums=0)
        jax.monitoring.register_event_duration_secs_listener(heard)
        need = needed(step, (square, other), mesh)
        compiled = len(made)
        jax.block_until_ready(step(square, other))
        jax.monitoring.unregister_event_duration_listener(heard)
    assert compiled == len(made) == 1
    assert 2 * 4 * 256**2 <= need.peak <= 8 * 4 * 256**2
    assert need.fits
    assert need.shared


@pytest.mark.parametrize(
    ("settings", "need", "first"),
    [
        (
            {"batch_size": 8},
            Need(10 * GIB, 8 * GIB, 6 * GIB),
            [
                "config.remat=full computes activations twice and keeps few of them",
                "config.grad_accum=2 takes the batch in smaller parts",
                "config.batch_size=4 makes it smaller",
                "config.base.quantize=nf4 holds the base in a quarter of bfloat16's bytes",
            ],
        ),
        (
            {"batch_size": 8, "grad_accum": 2, "remat": "full", "base.quantize": "int8"},
            Need(10 * GIB, 8 * GIB, 4 * GIB),
            ["config.grad_accum=8 takes the batch in smaller parts", "config.batch_size=2 makes it smaller"],
        ),
        (
            {"batch_size": 8, "remat": "full", "base.quantize": "nf4"},
            Need(10 * GIB, 2 * GIB, 6 * GIB),
            ["config.mesh.fsdp=N divides it among N devices"],
        ),
    ],
    ids=["rows", "parts", "base"],
)  # fmt: skip
def test_what_helps(
    settings: dict[str, Any], need: Need, first: list[str], configure: Callable[..., Any]
) -> None:
    """What is no more to be had is left out; where the base alone is too large, no batch is small enough."""
    config = configure(**settings)
    found = remedies(need, config, make_mesh(config.mesh))
    assert found[: len(first)] == first
    assert found[-1] == "jaxft plan tells what each of them needs"
    if "config.mesh" in first[0]:
        assert len(found) == 2


def test_a_device_refuses_and_a_machine_is_warned(configure: Callable[..., Any]) -> None:
    config, said = configure(), list[str]()
    mesh = make_mesh(config.mesh)
    require_room(Need(GIB, 0, GIB), config, mesh, said.append)
    require_room(Need(GIB, 0, None), config, mesh, said.append)
    assert not said
    with pytest.raises(
        UserError, match=r"needs 2.0 GiB on a device, which has 1.0 GiB: config"
    ) as told:
        require_room(Need(2 * GIB, GIB, GIB), config, mesh, said.append)
    assert "\n" not in str(told.value)
    require_room(Need(2 * GIB, GIB, GIB, shared=True), config, mesh, said.append)
    (line,) = said
    assert line.startswith("warning: the step needs 2.0 GiB on a device, which has 1.0 GiB of this")


def test_what_the_compiler_refuses_is_read() -> None:
    text = "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    assert refused(RuntimeError(text)) == (int(20.5 * GIB), int(15.75 * GIB))
    with pytest.raises(RuntimeError, match="something else"):
        refused(RuntimeError("something else"))


def test_a_run_says_it_before_its_first_step(
    configure: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once for the longest batch; where it does not fit, with what would."""
    monkeypatch.setattr(memory, "memory_of", lambda device: 2**20)
    train(configure(steps=2, **{"data.packing": True}), tmp_path / "run")
    said = capsys.readouterr().err.splitlines()
    (weight,) = (number for number, line in enumerate(said) if line.startswith("the step needs"))
    assert "MiB on a device, which has 1 MiB of this machine" in said[weight]
    assert said[weight - 1].startswith("compiling the step")
    assert said[weight + 1].startswith("warning: the step needs")
    assert "config.remat=full" in said[weight + 1]
    assert said[weight + 2].startswith("step 1/2")
    assert len(lines(tmp_path / "run")) == 2
