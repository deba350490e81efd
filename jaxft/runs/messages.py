"""What a run says in words: where examples stand, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxft.errors import counted
from jaxft.runtime.storage import is_remote


def next_commands(config: ConfigDict, base: str, output: Path, chats: bool) -> list[str]:
    """What to do with a run's output: to be copied as they stand.

    Args:
        config: the run's.
        base: the folder that the adapter stands on.
        output: RUN/adapter or RUN/model.
        chats: whether the run was trained on chats, and not on texts.
    """
    has_adapter = output.name == "adapter"
    if not has_adapter and is_remote(output):
        return [f"next: copy {output} to a folder, which jaxft generate takes as --model"]
    both = ["--model", base, "--adapter", str(output)] if has_adapter else ["--model", str(output)]
    merged = Path("merged") if is_remote(output) else output.with_name("merged")
    other = ["--tokenizer", config.tokenizer] if config.tokenizer else []
    asked = shlex.join([*both, *other])
    commands = [f"jaxft chat {asked}"] if chats else []
    commands.append(f'jaxft generate {asked}{" --chat" if chats else ""} --prompt "..."')
    if has_adapter:
        commands.append(f"jaxft merge {shlex.join([*both, '--output', str(merged)])}")
    lines = [f"next: {commands[0]}", *(f"  or: {command}" for command in commands[1:])]
    scheme = config.base.quantize
    if has_adapter and scheme != "none" and base == config.model:
        lines.append(f"they take {base} in {scheme}, as this run did: the adapter's card says so")
    return lines


def trained_line(method: str, trained: int, whole: int) -> str:
    """What a method trains.

    >>> trained_line("lora", 1024, 65536)
    'lora: 1,024 of 65,536 parameters train (1.56 %)'
    """
    return f"{method}: {trained:,} of {whole:,} parameters train ({100 * trained / whole:.3g} %)"


def device_line(mesh: Mesh, dtype: str, param_dtype: str) -> str:
    """What computes, and in which dtypes."""
    device = mesh.devices.flat[0]
    kind = device.platform if device.platform == "cpu" else device.device_kind
    return f"{counted(mesh.size, f'{kind} device')}; computes in {dtype}, weights in {param_dtype}"


def updates_line(steps: int, batch_size: int, counts: str, mesh: Mesh) -> str:
    """How many updates, of how many of what (`Kind.counts`), and where."""
    kind = mesh.devices.flat[0].platform
    size = counted(batch_size, counts)
    return f"{counted(steps, 'update')} of {size} on {counted(mesh.size, f'{kind} device')}"


def skipped(step: int, numbers: Mapping[str, float], ids: Sequence[str]) -> str:
    """That an update was not applied, and of which examples it was."""
    return (
        f"step {step}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}, learning rate "
        f"{numbers['learning_rate']:.3g}: the update is not applied; examples {shortened(ids)}"
    )


def shortened(ids: Sequence[str], most: int = 64) -> str:
    """Origins "path:line" in a line: those of one file together, and how many more there are than `most`.

    >>> shortened(["a.jsonl:3", "a.jsonl:1", "b.jsonl:2"], most=2)
    'a.jsonl:3,1 and 1 more'
    """
    files: dict[str, list[str]] = {}
    for origin in ids[:most]:
        path, _, line = origin.rpartition(":")
        files.setdefault(path, []).append(line)
    text = " ".join(f"{path}:{','.join(lines)}" for path, lines in files.items())
    return text + (f" and {len(ids) - most} more" if len(ids) > most else "")
