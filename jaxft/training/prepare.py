"""From a configuration to everything a run needs: model, method, data, mesh."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxft.adaptation import adapt, adopt
from jaxft.assets import model_folder
from jaxft.data import (
    Batches,
    Example,
    Row,
    Tokenizer,
    encode_chat,
    load_tokenizer,
    prepare_examples,
    read_rows,
)
from jaxft.data.packing import length_buckets
from jaxft.errors import UserError
from jaxft.formats import check_exportable, load, load_adapter, saved_leaves
from jaxft.formats.config_file import model_config
from jaxft.methods import Method, row_of
from jaxft.models import Config, Transformer, module_names
from jaxft.objectives import objective_of
from jaxft.training.sharding import (
    leaf_sharding,
    lengths_on,
    require_divisible,
    require_rows,
    shardings,
)
from jaxft.training.step import Loss
from jaxft.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
        tokenizer: the model's, or the one that `config.tokenizer` names.
        train: the endless training batches.
        held_out: one pass over the held-out ones, or None.
        prompts: held-out rows that are answered at each evaluation.
        lines: what became of the rows, to be said.
    """

    tokenizer: Tokenizer
    train: Batches
    held_out: Batches | None
    prompts: list[Row]
    lines: list[str]


def method_of(config: ConfigDict) -> Method:
    """The row of the table that `config.method` names, with its settings."""
    settings = {key: value for key, value in config.method.items() if key != "name"}
    return row_of(config.method.name)(**settings)


def prepare_model(config: ConfigDict, mesh: Mesh) -> tuple[Transformer, PyTree, Method]:
    """The model, its adapted tree on the mesh, and the method.

    The tree is adapted anew, or by the folder `config.adapter`, whose whole modules then train too.
    """
    method = method_of(config)
    require_divisible(model_config(model_folder(config.model)), mesh)
    model, params = load(
        model_folder(config.model),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        shardings=lambda path, shape: leaf_sharding(mesh, path, shape),
    )
    model = Transformer(dataclasses.replace(model.config, remat=config.remat))
    if config.adapter:
        saved = saved_leaves(params, config.adapter)
        method = dataclasses.replace(method, train_also=(*method.train_also, *saved))
        params = adopt(load_adapter(params, config.adapter), method, config.adapter)
    else:
        names = module_names(model.config)
        params = adapt(params, method, jax.random.key(config.seed), names=names)
    check_exportable(params, method)
    return model, jax.device_put(params, shardings(params, mesh)), method


def prepare_data(config: ConfigDict, model: Config, mesh: Mesh) -> Data:
    """Reads, tokenizes and batches the training and held-out rows."""
    settings = config.data
    if not settings.train:
        raise UserError("config.data.train: give a JSONL file to train on")
    max_length = settings.max_length or min(1024, model.max_length)
    if max_length > model.max_length:
        raise UserError(
            f"config.data.max_length {max_length} exceeds the model's {model.max_length}"
        )
    for key in ("batch_size", "eval_batch_size"):
        require_rows(config[key] // (config.grad_accum if key == "batch_size" else 1), mesh, key)
    buckets = lengths_on(length_buckets(max_length), mesh)
    tokenizer = load_tokenizer(
        config.tokenizer or model_folder(config.model), settings.chat_template
    )
    make = functools.partial(
        Batches,
        max_length=max_length,
        packing=settings.packing,
        seed=config.seed,
        pad_id=tokenizer.pad_id,
        buckets=buckets,
    )

    def examples(paths: Any) -> tuple[list[Row], list[Example], str]:
        rows = read_rows(paths, settings.format)
        kept, summary = prepare_examples(
            rows,
            tokenizer,
            max_length=max_length,
            loss_on=settings.loss_on,
            vocabulary_size=model.vocabulary,
        )
        return rows, kept, str(summary)

    _, kept, line = examples(settings.train)
    train = make(kept, batch_size=config.batch_size, shuffle=settings.shuffle)
    lines = [f"training data: {line}; {_rows_line(train, settings.packing)}"]
    held_out, prompts = None, []
    if settings.eval:
        rows, kept, line = examples(settings.eval)
        held_out = make(kept, batch_size=config.eval_batch_size, shuffle=False, epochs=1)
        lines.append(f"held-out data: {line}")
        room = model.max_length - config.samples.max_new_tokens
        prompts = _spread(rows, config.samples.count)
        short = [row for row in prompts if prompt_length(row, tokenizer) <= room]
        if len(short) < len(prompts):
            lines.append(f"{len(prompts) - len(short)} sample prompts leave no room for an answer")
        prompts = short
    return Data(tokenizer, train, held_out, prompts, lines)


def prompt_and_reference(row: Row) -> tuple[Any, str]:
    """What a held-out row asks (a text or messages), and what it answers."""
    if row.format == "messages":
        messages = row.values["messages"]
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
        return messages[:last], messages[last]["content"]
    if row.format == "text":
        words = row.values["text"].split(" ")
        half = max(len(words) // 2, 1)
        return " ".join(words[:half]), " " + " ".join(words[half:])
    prompt, completion = row.values["prompt"], row.values["completion"]
    return prompt, completion if isinstance(completion, str) else completion[-1]["content"]


def prompt_length(row: Row, tokenizer: Tokenizer) -> int:
    """The tokens of what a row asks."""
    prompt, _ = prompt_and_reference(row)
    if isinstance(prompt, str):
        return len(tokenizer.encode(prompt))
    return len(encode_chat(tokenizer, prompt, add_generation_prompt=True))


def _rows_line(batches: Batches, packing: bool) -> str:
    packed = f"{batches.rows} packed rows, {100 * batches.fill:.1f} % filled; " if packing else ""
    return f"{packed}{batches.steps_per_epoch} updates an epoch"


def _spread(rows: list[Row], count: int) -> list[Row]:
    """`count` rows spread over all."""
    return [rows[index * len(rows) // count] for index in range(min(count, len(rows)))]


def updates_of(config: ConfigDict, steps_per_epoch: int) -> int:
    """How many updates the run makes: `config.steps`, or those of `config.epochs`."""
    return config.steps or math.ceil(config.epochs * steps_per_epoch)


def loss_of(config: ConfigDict, model: Config) -> Loss:
    """The objective on this model: (params, batch) -> (sum, weight)."""
    return functools.partial(objective_of(config.objective), model)
