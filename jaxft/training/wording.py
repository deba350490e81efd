"""What a run says in words: where examples stand, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh

from jaxft.places import is_remote


def next_commands(model: str, output: Path, has_adapter: bool) -> list[str]:
    """What to do with a run's output."""
    merged = Path("merged") if is_remote(output) else output.with_name("merged")
    if not has_adapter and is_remote(output):
        return [f"next: copy {output} to a folder, which jaxft generate takes as --model"]
    if not has_adapter:
        return [f'next: jaxft generate --model {output} --prompt "..."']
    both = f"--model {model} --adapter {output}"
    return [
        f'next: jaxft generate {both} --prompt "..."',
        f"  or: jaxft merge {both} --output {merged}",
    ]


def trained_line(method: str, trained: int, whole: int) -> str:
    """What a method trains.

    >>> trained_line("lora", 1024, 65536)
    'lora: 1,024 of 65,536 parameters train (1.56 %)'
    """
    return f"{method}: {trained:,} of {whole:,} parameters train ({100 * trained / whole:.3g} %)"


def updates_line(steps: int, batch_size: int, mesh: Mesh) -> str:
    """How many updates, of what, and where."""
    kind = mesh.devices.flat[0].platform
    return f"{steps} updates of {batch_size} sequences on {mesh.size} {kind} device{'s' * (mesh.size > 1)}"


def skipped(step: int, numbers: Mapping[str, float], ids: Sequence[str]) -> str:
    """That an update was not applied, and of which examples it was."""
    return (
        f"step {step}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}, learning rate "
        f"{numbers['learning_rate']:.3g}: the update is not applied; examples {shortened(ids)}"
    )


def shortened(ids: Sequence[str], most: int = 64) -> str:
    """Places "path:line" in a line: those of one file together, and how many more there are than `most`.

    >>> shortened(["a.jsonl:3", "a.jsonl:1", "b.jsonl:2"], most=2)
    'a.jsonl:3,1 and 1 more'
    """
    files: dict[str, list[str]] = {}
    for place in ids[:most]:
        path, _, line = place.rpartition(":")
        files.setdefault(path, []).append(line)
    text = " ".join(f"{path}:{','.join(lines)}" for path, lines in files.items())
    return text + (f" and {len(ids) - most} more" if len(ids) > most else "")
