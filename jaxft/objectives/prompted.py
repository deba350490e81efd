"""Examples of objectives that learn from rewards: prompts, with whatever the graders read beside them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxft.data import Examples, Row, Tokenizer
from jaxft.data.prompts import Prompts, PromptSummary, prepare_prompts, read_prompt_rows
from jaxft.data.report import Part, beyond, duplicates
from jaxft.data.show import harmless, histogram_lines
from jaxft.data.store import Example
from jaxft.errors import UserError, counted, shown
from jaxft.objectives.completions import row_length_of
from jaxft.objectives.graders import Grader, check_items, read_graders
from jaxft.objectives.kind import Kind
from jaxft.runtime.untrusted import read_text


class Judges(NamedTuple):
    """The graders of a run.

    Attributes:
        graders: whose rewards are learned from.
        watching: those that only look on: a policy that learns to please `graders` alone does not please them.
    """

    graders: tuple[Grader, ...]
    watching: tuple[Grader, ...] = ()


def judges_of(config: ConfigDict) -> Judges:
    """The graders that `config.graders` names: a file, or JSON itself.

    Raises UserError as `read_graders` does.
    """
    source = config.graders.strip()
    if not source:
        raise UserError(
            "config.graders: give a JSON file of graders, which say what an answer is worth: "
            '[{"type": "string_check", "operation": "eq", "input": "{{ sample.output_text }}", '
            '"reference": "{{ item.answer }}"}]'
        )
    written = source.startswith(("[", "{"))
    return _judges(source, source if written else read_text(Path(source)), written)


@functools.lru_cache(maxsize=8)
def _judges(source: str, text: str, written: bool) -> Judges:
    where = "config.graders" if written else source
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if isinstance(found, str):  # which `read_graders` would take for a file's name
        raise UserError(f"{where}: a list of graders is expected, not the text {shown(found)}")
    if not isinstance(found, Mapping) or "held_out" not in found:
        return Judges(read_graders(found, where))
    learned = {key: value for key, value in found.items() if key != "held_out"}
    if not learned:
        raise UserError(f"{where}: held_out only looks on: graders, to learn from, are missing beside it")  # fmt: skip
    watching = read_graders(found["held_out"], f"{where}: held_out")
    return Judges(read_graders(learned, where), watching)


class PromptBatches:
    """Which prompts are asked at each update: an endless row of epochs, cut into batches that are always whole.

    Args:
        prompts: to be asked.
        batch_size: prompts of a batch, over all hosts.
        shuffle: another order in each epoch.
        seed: of the order.
        pad_id: the token where a row holds none.
        buckets: ascending lengths of rows.
        host_rows: (first, last + 1) of the rows of each batch that this host makes; None: all.
        updates: made from each batch.

    Attributes:
        rows: prompts in an epoch.
        fill: the share of a packed row that holds tokens; rows are not packed.
        steps_per_epoch: updates that an epoch takes; its last batch is filled up from the next epoch.
    """

    def __init__(
        self,
        prompts: Prompts,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        pad_id: int,
        buckets: Sequence[int],
        host_rows: tuple[int, int] | None,
        updates: int,
    ) -> None:
        self.prompts, self.batch_size, self.pad_id = prompts, batch_size, pad_id
        self.buckets, self.host_rows = list(buckets), host_rows or (0, batch_size)
        self.rows, self.fill = len(prompts), 1.0
        self.steps_per_epoch = -(-self.rows // batch_size) * updates
        self.settings = {"seed": seed, "shuffle": shuffle, "batch_size": batch_size}
        order = grain.MapDataset.range(self.rows)
        self._order = (order.shuffle(seed=seed % 2**32) if shuffle else order).repeat(None)

    def indices(self, number: int) -> list[int]:
        """The prompts of batch `number`, over all hosts."""
        first = number * self.batch_size
        return [int(self._order[place]) for place in range(first, first + self.batch_size)]


def read(
    config: ConfigDict,
    paths: Any,
    tokenizer: Tokenizer,
    max_length: int,
    vocabulary_size: int | None = None,
    held_out: bool = False,
    strict: bool = False,
) -> tuple[Any, Prompts, PromptSummary]:
    """The rows of `paths`, the prompts, and their counts: see `jaxft.objectives.kind.Read`.

    Raises UserError also where a row lacks what a grader asks for.
    """
    found = rows(config, paths, held_out=held_out)
    judges = judges_of(config)
    items = {row.origin: row.values["item"] for row in found}
    check_items((*judges.graders, *judges.watching), items)
    examples, summary = prepare_prompts(
        found,
        tokenizer,
        room=max_length - config.rollout.max_new_tokens,
        skip=config.data.bad_rows == "skip",
        vocabulary_size=vocabulary_size,
    )
    return found, examples, summary


class Asked(list[Row]):
    """Rows to ask for samples."""

    sources = ()


def rows(
    config: ConfigDict,
    paths: Any,
    *,
    held_out: bool = False,
    as_messages: bool = False,
    strict: bool = False,
) -> Asked:
    """The rows of files, as `config.data` reads them."""
    settings = config.data
    return Asked(
        read_prompt_rows(paths, held_out=held_out, fields=settings.fields, ignore=settings.ignore)
    )


def batches(
    config: ConfigDict,
    examples: Examples,
    *,
    batch_size: int,
    max_length: int,
    shuffle: bool,
    pad_id: int,
    epochs: int | None = None,
    buckets: Sequence[int] | None = None,
    host_rows: tuple[int, int] | None = None,
) -> PromptBatches:
    """Batches of prompts; arguments are those of `Batches`."""
    assert isinstance(examples, Prompts)
    del epochs
    return PromptBatches(
        examples,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=config.seed,
        pad_id=pad_id,
        buckets=buckets or [row_length(config, max_length)],
        host_rows=host_rows,
        updates=config.rollout.updates,
    )


def row_length(config: ConfigDict, max_length: int) -> int:
    """The tokens of the longest row: a prompt and all its completions."""
    new = config.rollout.max_new_tokens
    return row_length_of(max(max_length - new, 1), config.rollout.group, new)


def shapes(config: ConfigDict, max_length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The longest batch that a policy learns from: see `jaxft.objectives.completions.policy_objective`."""
    length, count = row_length(config, max_length), config.batch_size
    rows, slots = (count, length), (count, config.rollout.group)
    tokens = (*slots, config.rollout.max_new_tokens)
    found: dict[str, tuple[tuple[int, ...], Any]] = {}
    for name in ("tokens", "segments", "positions", "branches"):
        found[name] = (rows, jnp.int32)
    for name in ("starts", "counted"):
        found[name] = (slots, jnp.int32)
    found |= {"advantages": (slots, jnp.float32), "temperature": ((count, 1), jnp.float32)}
    found["sampled"] = (tokens, jnp.float32)
    if config.rollout.updates > 1 or config.rollout.ahead:
        found["off_policy"] = ((count, 1), jnp.float32)
    if config.objective.beta:
        found["reference"] = (tokens, jnp.float32)
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in found.items()}


def _findings(config: ConfigDict, part: Part, tokenizer: Tokenizer, vocabulary: int) -> list[str]:
    lines = [*beyond(part.examples, vocabulary), *duplicates(part.examples)]
    if isinstance(part.summary, PromptSummary) and part.summary.skipped:
        what = f"{counted(part.summary.skipped, 'prompt')} of {part.summary.rows} left out"
        lines.append(
            f"{what}: no room for an answer (data.bad_rows=skip): a larger data.max_length keeps them"
        )
    return lines


def _lengths(part: Part, row_length: int) -> list[str]:
    room = part.summary.room if isinstance(part.summary, PromptSummary) else row_length
    return ["  tokens of a prompt:", *histogram_lines(part.examples.lengths, room)]


def _shown(
    part: Part, example: Example, tokenizer: Tokenizer, marks: tuple[str, str]
) -> tuple[int, list[str]]:
    text = harmless(tokenizer.decode(example.tokens.tolist(), skip_special_tokens=False))
    item = next(
        (row.values["item"] for row in part.rows if row.origin == example.origin), dict[str, Any]()
    )
    beside = json.dumps(item, ensure_ascii=False, default=str)
    lines = [
        *(f"    {line}" for line in text.split("\n")),
        f"    {marks[0]}the answer, sampled{marks[1]}",
    ]
    return 0, [*lines, f"  for graders: {harmless(beside)}"]


PROMPTS = Kind(
    rows=rows,
    read=read,
    batches=batches,  # type: ignore[arg-type]
    row_length=row_length,
    shapes=shapes,
    findings=_findings,
    lengths=_lengths,
    shown=_shown,
    packs=False,
    counts="prompt",
)
