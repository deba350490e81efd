"""From a configuration to everything a run needs: model, method, data, mesh."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxft.adaptation import adapt, adopt
from jaxft.assets import model_folder
from jaxft.data import (
    Batches,
    Examples,
    Row,
    Rows,
    Summary,
    Tokenizer,
    load_tokenizer,
    prepare_examples,
    read_rows,
)
from jaxft.data.mixing import check_weights, mix, mix_line
from jaxft.data.packing import length_buckets
from jaxft.data.questions import prompt_and_reference, prompt_length
from jaxft.data.report import Part
from jaxft.errors import UserError, counted
from jaxft.formats import check_exportable, load, load_adapted, load_adapter, saved_leaves
from jaxft.formats.companions import merged_tokenizer
from jaxft.formats.config_file import model_config
from jaxft.formats.manifest import tell_another_base
from jaxft.methods import Method, row_of
from jaxft.models import Config, Transformer, module_names
from jaxft.objectives import objective_of
from jaxft.runtime.sandbox import TooMuch, today
from jaxft.runtime.storage import fetched
from jaxft.training.preference_data import (
    compares,
    preference_batches,
    preference_examples,
    preference_shapes,
)
from jaxft.training.sharding import (
    host_rows,
    leaf_sharding,
    lengths_on,
    require_divisible,
    require_rows,
    shardings,
)
from jaxft.training.step import Loss
from jaxft.tree import PyTree

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
        tokenizer: the model's, or the one that `config.tokenizer` names.
        train: the endless training batches.
        held_out: one pass over each held-out set, by name; "" where `config.data.eval` is one file.
        prompts: rows of the first held-out set that are answered at each evaluation.
        lines: what became of the rows, to be said.
        parts: the training data and the held-out sets as they were read.
        chats: whether what is trained is asked by messages, and not by texts.
    """

    tokenizer: Tokenizer
    train: Batches
    held_out: dict[str, Batches]
    prompts: list[Row]
    lines: list[str]
    parts: list[Part]
    chats: bool = False


def method_of(config: ConfigDict) -> Method:
    """The row of the table that `config.method` names, with its settings."""
    settings = {key: value for key, value in config.method.items() if key != "name"}
    method = row_of(config.method.name)(**settings)
    if config.adapter and method.init != "default":
        raise UserError(
            f"config.adapter goes on from {config.adapter}: config.method.init {method.init} begins anew; take one"
        )
    return method


def prepare_model(config: ConfigDict, mesh: Mesh) -> tuple[Transformer, PyTree, Method]:
    """The model, its adapted tree on the mesh, and the method.

    The tree is adapted anew, or by the folder `config.adapter`, whose whole modules then train too.
    """
    method = method_of(config)
    if method.weight is None and config.base.quantize != "none":
        raise UserError(
            f"config.base.quantize {config.base.quantize}: method {method.name} trains the base, and codes cannot be "
            "trained: take an adapter (configs/sft.py:qlora), or config.base.quantize=none"
        )
    require_divisible(model_config(model_folder(config.model)), mesh)
    options: dict[str, Any] = {
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "shardings": lambda path, shape: leaf_sharding(mesh, path, shape),
        "quantize": config.base.quantize,
        "group_size": config.base.group_size,
        "double_quant": config.base.double_quant,
    }
    folder = model_folder(config.model)
    if config.adapter:
        model, params = load(folder, **options)
        method = trained_by(config, params, method)
        params = adapted(config, model.config, params, method)
    else:
        model, params = load_adapted(folder, method, jax.random.key(config.seed), **options)
    check_exportable(params, method)
    model = Transformer(dataclasses.replace(model.config, remat=config.remat))
    return model, jax.device_put(params, shardings(params, mesh)), method


def trained_by(config: ConfigDict, params: PyTree, method: Method) -> Method:
    """The method, under which what the folder `config.adapter` saved whole trains too."""
    if not config.adapter:
        return method
    tell_another_base(fetched(config.adapter), model_folder(config.model))
    saved = saved_leaves(params, config.adapter)
    return dataclasses.replace(method, train_also=(*method.train_also, *saved))


def adapted(
    config: ConfigDict, model: Config, params: PyTree, method: Method, **starts: Any
) -> PyTree:
    """The tree adapted anew, or by the folder `config.adapter`. Works on abstract trees, under `jax.eval_shape`.

    `starts` are of `adapt`.
    """
    if config.adapter:
        return adopt(load_adapter(params, config.adapter), method, config.adapter)
    return adapt(params, method, jax.random.key(config.seed), names=module_names(model), **starts)


def prepare_data(
    config: ConfigDict, model: Config, mesh: Mesh, complete: Callable[..., Any] | None = None
) -> Data:
    """Reads, tokenizes and batches the training and held-out rows.

    `complete`, if given, takes ("train" or "eval...", examples, max_length, pad_id) and returns the examples with what
    is to be computed for them beforehand.
    """
    settings, max_length = config.data, max_length_of(config, model)
    for key in ("batch_size", "eval_batch_size"):
        require_rows(config[key] // (config.grad_accum if key == "batch_size" else 1), mesh, key)
    buckets = lengths_on(length_buckets(places_of(config, max_length)), mesh)
    tokenizer = tokenizer_of(config)

    def make(name: str, examples: Examples, size: int, **options: Any) -> Batches:
        if complete is not None:
            examples = complete(name, examples, max_length=max_length, pad_id=tokenizer.pad_id)
        return batches_of(
            config,
            examples,
            batch_size=size,
            max_length=max_length,
            pad_id=tokenizer.pad_id,
            buckets=buckets,
            host_rows=host_rows(size, mesh),
            **options,
        )

    first, *others = parts_of(
        config,
        tokenizer=tokenizer,
        max_length=max_length,
        vocabulary_size=model.vocabulary,
        strict=True,
    )
    rows: Any = first.rows
    chats = are_chats(rows)
    epoch = epoch_of(config, rows, first.examples, first.summary)
    train = make("train", epoch, config.batch_size, shuffle=settings.shuffle)
    lines = [f"{first.name}: {first.summary}; {_rows_line(train, settings.packing)}"]
    lines += source_lines(rows) + mix_lines(config, rows, first.summary) + date_lines(tokenizer)
    held_out: dict[str, Batches] = {}
    prompts: list[Row] = []
    for name, part in zip(named_sets(settings.eval), others, strict=True):
        rows, split = part.rows, f"eval_{name}" if name else "eval"
        held_out[name] = make(split, part.examples, config.eval_batch_size, shuffle=False, epochs=1)
        lines += [f"{part.name}: {part.summary}", *source_lines(rows)]
        chosen = spread(range(part.summary.rows), config.samples.count)
        prompts = prompts or _rows_at(rows, chosen)
    room = model.max_length - config.samples.max_new_tokens
    short = [row for row in prompts if _fits(row, tokenizer, room)]
    if len(short) < len(prompts):
        lost = counted(len(prompts) - len(short), "sample prompt")
        lines.append(
            f"for samples {lost} cannot be used: nothing is asked, or no room is left for an answer"
        )
    return Data(tokenizer, train, held_out, short, lines, [first, *others], chats)


def parts_of(config: ConfigDict, **settings: Any) -> list[Part]:
    """The training data and each held-out set; `settings` are further arguments of `read_data`."""
    sets = {"training data": config.data.train}
    for name, paths in named_sets(config.data.eval).items():
        sets[f"held-out data {name!r}" if name else "held-out data"] = paths
    return [
        Part(name, *read_data(config, paths, **settings, held_out=name != "training data"))
        for name, paths in sets.items()
    ]


def read_data(config: ConfigDict, paths: Any, **settings: Any) -> tuple[Any, Examples, Any]:
    """The rows of `paths`, the examples that the objective makes of them, and their counts.

    `settings` are the arguments of `read_examples`.
    """
    if not paths:
        raise UserError("config.data.train: give a file to train on")
    return (preference_examples if compares(config) else read_examples)(config, paths, **settings)


def batches_of(config: ConfigDict, examples: Examples, **settings: Any) -> Batches:
    """Batches of what the objective takes; `settings` are the other arguments of `Batches`."""
    make = preference_batches if compares(config) else Batches
    return make(examples, packing=config.data.packing, seed=config.seed, **settings)


def places_of(config: ConfigDict, max_length: int) -> int:
    """The places of the longest row: a pair stands in one."""
    return 2 * max_length if compares(config) else max_length


def batch_shapes(config: ConfigDict, max_length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A training batch of the longest rows, as shapes; the data are not read."""
    rows = config.batch_size
    if compares(config):
        packing, known = config.data.packing, config.objective.precompute
        return preference_shapes(rows, max_length, packing=packing, known=known)
    dtypes = dict.fromkeys(("tokens", "segments", "positions"), jnp.int32)
    dtypes["weights"] = jnp.float32
    shape = (rows, max_length)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}


def named_sets(paths: Any) -> dict[str, Any]:
    """The held-out files of `config.data.eval` by name; a single one has the name ""."""
    if isinstance(paths, Mapping):
        return dict(paths)
    return {"": paths} if paths else {}


def max_length_of(config: ConfigDict, model: Config) -> int:
    """The tokens of a row: `config.data.max_length`, or 1024, or the model's where that is less."""
    max_length = config.data.max_length or min(1024, model.max_length)
    if max_length > model.max_length:
        raise UserError(
            f"config.data.max_length {max_length} exceeds the model's {model.max_length}"
        )
    return int(max_length)


def tokenizer_of(config: ConfigDict) -> Tokenizer:
    """The tokenizer that `config.tokenizer` names, else the model's and what stands beside `config.adapter`.

    Its template writes the run's date or today.
    """
    options = config.data.chat_template, config.data.date or today()
    if config.tokenizer:
        return load_tokenizer(config.tokenizer, *options)
    adapter = fetched(config.adapter) if config.adapter else None
    return merged_tokenizer(model_folder(config.model), adapter, *options)


def read_examples(
    config: ConfigDict,
    paths: Any,
    tokenizer: Tokenizer,
    max_length: int,
    vocabulary_size: int | None = None,
    held_out: bool = False,
    strict: bool = False,
) -> tuple[Rows, Examples, Summary]:
    """The rows of `paths`, the examples that they become, and their counts.

    `strict` refuses rows with text that is not used.
    """
    settings = config.data
    rows = read_rows(
        paths,
        settings.format,
        settings.fields,
        held_out=held_out,
        as_messages=tokenizer.chat_template is not None,
        ignore=settings.ignore,
        strict=strict,
    )
    if settings.mix and not held_out:
        check_weights(settings.mix, len(rows.sources))
    examples, summary = prepare_examples(
        rows,
        tokenizer,
        max_length=max_length,
        loss_on=settings.loss_on,
        on_unwritten=settings.on_unwritten,
        vocabulary_size=vocabulary_size,
        split_texts=settings.packing,
    )
    return rows, examples, summary


def epoch_of(config: ConfigDict, rows: Rows, examples: Examples, summary: Summary) -> Examples:
    """What an epoch of training holds: every example, or a mixture as `config.data.mix` says."""
    if not config.data.mix:
        return examples
    return mix(examples, [source.name for source in rows.sources], summary.kept, config.data.mix)


def are_chats(rows: Any) -> bool:
    """Whether the first row of any source is of messages."""
    each = [dataclasses.replace(rows, sources=(one,)) for one in rows.sources] or [rows]
    firsts = [next(iter(one), None) for one in each]
    return any(
        row and isinstance(row.values.get("messages", row.values.get("prompt")), list)
        for row in firsts
    )


def source_lines(rows: Rows) -> list[str]:
    """What was chosen in the sources."""
    return [f"{source.name}: {', '.join(source.notes)}" for source in rows.sources if source.notes]


def date_lines(tokenizer: Tokenizer) -> list[str]:
    """The date that the chat template writes, if it writes one."""
    line = f"the chat template writes the date, in this run {tokenizer.date} (config.data.date)"
    return [line] if tokenizer.writes_date else []


def mix_lines(config: ConfigDict, rows: Rows, summary: Summary) -> list[str]:
    """How the sources of the training data are mixed, if they are."""
    names = [source.name for source in rows.sources]
    return [mix_line(names, summary.kept, config.data.mix)] if config.data.mix else []


def _rows_at(rows: Rows, indices: Sequence[int]) -> list[Row]:
    """The rows with these numbers, read once more."""
    wanted, last = set(indices), max(indices, default=-1)
    return [row for n, row in enumerate(itertools.islice(rows, last + 1)) if n in wanted]


def _fits(row: Row, tokenizer: Tokenizer, room: int) -> bool:
    """Whether what a row asks is something, has no more tokens, and can be rendered at all."""
    if not prompt_and_reference(row)[0]:  # the assistant speaks first
        return False
    try:
        return prompt_length(row, tokenizer) <= room
    except TooMuch:
        return False


def _rows_line(batches: Batches, packing: bool) -> str:
    rows = f"{counted(batches.rows, 'packed row')}, {100 * batches.fill:.1f} % filled; "
    return f"{rows * packing}{counted(batches.steps_per_epoch, 'update')} an epoch"


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, or all if they are fewer, spread over all.

    >>> spread("abcdef", 2), spread("ab", 3)
    (['a', 'd'], ['a', 'b'])
    """
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def updates_of(config: ConfigDict, steps_per_epoch: int) -> int:
    """How many updates the run makes: `config.steps`, or those of `config.epochs`."""
    return config.steps or math.ceil(config.epochs * steps_per_epoch)


def loss_of(config: ConfigDict, model: Config, reference: Config) -> Loss:
    """The objective on this model: (params, batch, *reference's tree) -> (sum, what is counted beside it)."""
    loss = functools.partial(objective_of(config.objective), model)
    return functools.partial(loss, reference_config=reference) if compares(config) else loss
