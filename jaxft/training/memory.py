"""The memory that a compiled step needs on a device, and what to do where the device has less."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxft.configuration.rules import CHOICES
from jaxft.errors import UserError
from jaxft.methods import row_of

# What the compiler says of a program that does not fit: after it has laid out the buffers, or before.
USED = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
MADE = re.compile(r"HLO temporaries \(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
GIB = 2**30


class NoRoom(UserError):
    """The device's memory does not hold a step."""


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of a step on one device.

    Attributes:
        peak: the most in use at once.
        temporary: of that, what the step makes and drops: it grows with the rows of a part of a batch.
        limit: what there is; None where the device does not say.
        shared: whether the limit is the machine's own memory, in which other programs live too.
    """

    peak: int
    temporary: int
    limit: int | None
    shared: bool = False

    @property
    def fits(self) -> bool:
        """Whether there is enough, as far as is known."""
        return self.limit is None or self.peak <= self.limit

    def __str__(self) -> str:
        """As the log says it."""
        line = f"the step needs {_size(self.peak)} on a device"
        if self.limit is None:
            return line
        return f"{line}, which has {_size(self.limit)}{' of this machine' * self.shared}"


def needed(update: Callable[..., Any], arguments: Sequence[Any], mesh: Mesh) -> Need:
    """What a jitted step needs for these arguments. It is compiled for that; the next call finds it compiled.

    Raises whatever the compiler does, but for a refusal for want of memory, which is a `Need` as well.
    """
    device = mesh.devices.flat[0]
    shared = device.platform == "cpu"
    here = len(mesh.local_devices) if shared else 1
    limit = memory_of(device)
    limit = limit // here if limit is not None else None
    try:
        compiled = update.lower(*arguments).compile()  # type: ignore[attr-defined]
    except jax.errors.JaxRuntimeError as error:
        peak, room = refused(error)
        return Need(peak, peak, room)
    analysis = compiled.memory_analysis()
    on_tpu = device.platform == "tpu"
    temporary = tpu_temporaries(analysis) if on_tpu else analysis.temp_size_in_bytes
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return Need(held - analysis.alias_size_in_bytes + temporary, temporary, limit, shared)


def memory_of(device: Any) -> int | None:
    """Bytes of a device's memory; of a CPU, the machine's; None where the device does not say."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (device.memory_stats() or {}).get("bytes_limit")


def require_room(need: Need, config: ConfigDict, mesh: Mesh, say: Callable[[str], None]) -> None:
    """Tells in one line where a step does not fit, with the settings that make it smaller.

    Where the memory is the machine's, which may swap, that is a warning.

    Raises:
        NoRoom: the device's own memory does not hold it.
    """
    if need.fits:
        return
    line = f"{need}: {'; '.join(remedies(need, config, mesh))}"
    if not need.shared:
        raise NoRoom(line)
    say(f"warning: {line}")


def remedies(need: Need, config: ConfigDict, mesh: Mesh) -> list[str]:
    """Settings that make the step smaller, those that change no result first.

    The temporaries are taken to grow in a line with the rows that are computed at once.
    """
    found = []
    least = CHOICES["remat"][-1]  # they are in the order of what they keep
    if config.remat != least:
        found.append(f"config.remat={least} computes activations twice and keeps few of them")
    assert need.limit is not None
    room, rows = need.limit - (need.peak - need.temporary), config.batch_size // config.grad_accum
    unit = mesh.shape["data"] * mesh.shape["fsdp"]
    sizes = [size for size in range(unit, rows, unit) if rows % size == 0]
    fit = [size for size in sizes if need.temporary * size <= room * rows]
    if fit:
        parts = config.batch_size // fit[-1]
        found.append(f"config.grad_accum={parts} takes the batch in smaller parts")
        found.append(f"config.batch_size={fit[-1] * config.grad_accum} makes it smaller")
    if row_of(config.method.name)().weight is not None and config.base.quantize == "none":
        found.append("config.base.quantize=nf4 holds the base in a quarter of bfloat16's bytes")
    if not fit or math.prod(mesh.shape.values()) == 1:
        found.append("config.mesh.fsdp=N divides it among N devices")
    return [*found, "jaxft plan tells what each of them needs"]


def refused(error: Exception) -> tuple[int, int]:
    """(bytes that a program takes, bytes that there are) as the compiler's refusal tells them.

    Another error is raised on.
    """
    found = USED.search(str(error)) or MADE.search(str(error))
    if found is None:
        raise error
    size, room = (int(float(found[i]) * UNITS[found[i + 1]]) for i in (1, 3))
    return size, room


def tpu_temporaries(analysis: Any) -> int:
    """Bytes of a TPU program's temporaries, or slightly more, from its `memory_analysis()`.

    The compiler adds the gaps between buffers to their extent, which they are part of (seen where it refuses a program
    and prints both); the most that is live at once tells the gaps. It is at least the buffers without them.
    """
    extent = analysis.temp_size_in_bytes
    live = max(analysis.peak_memory_in_bytes - analysis.argument_size_in_bytes, 0)
    return min(extent, (extent + live) // 2)


def _size(number: int) -> str:
    """Bytes in GiB, or in MiB where they are few.

    >>> _size(3 * 2**29), _size(2**20)
    ('1.5 GiB', '1 MiB')
    """
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 2**20:.0f} MiB"
