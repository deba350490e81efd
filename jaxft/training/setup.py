"""The model of a run: read, adapted by its method, laid out on the mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxft.adaptation import adapt, adopt
from jaxft.assets import model_folder
from jaxft.errors import UserError, shown
from jaxft.formats import check_exportable, load, load_adapted, load_adapter, saved_leaves
from jaxft.formats.config_file import model_config
from jaxft.formats.manifest import tell_another_base
from jaxft.methods import Method, row_of
from jaxft.models import Config, Transformer, module_names
from jaxft.models.transformer import fitted
from jaxft.objectives.reading import ADDED, added_tokens
from jaxft.runtime.storage import fetched
from jaxft.training.sharding import leaf_sharding, require_divisible, shardings
from jaxft.tree import PyTree
from jaxft.vocabulary import EMBEDDING, HEAD
from jaxft.weights import weights_of

WHOLE = "trainable_token_indices"


def method_of(config: ConfigDict) -> Method:
    """The row of the table that `config.method` names, with its settings."""
    settings = {key: value for key, value in config.method.items() if key != "name"}
    method = row_of(config.method.name)(**settings)
    if config.adapter and method.init != "default":
        raise UserError(
            f"config.adapter goes on from {config.adapter}: config.method.init {method.init} begins anew; take one"
        )
    return method


def with_added_tokens(config: ConfigDict, method: Method) -> tuple[Method, int]:
    """(the method, under which the rows of `config.data.add_tokens` train, the tokens to make room for; 0: none).

    They train in the embedding and in the head; what goes on from an adapter trains those that it has.

    Raises:
        UserError: a method whose adapter cannot hold rows of tokens, or tokens that `config.adapter` does not train.
    """
    ids = added_tokens(config)
    if not ids:
        return method, 0
    if WHOLE in method.without:
        raise UserError(f"{ADDED}: method {method.name} trains none: {method.without[WHOLE]}")
    if config.adapter:
        return method, 0
    given = method.trainable_token_indices
    given = given if isinstance(given, Mapping) else {EMBEDDING: given}
    both = {path: tuple(dict.fromkeys((*given.get(path, ()), *ids))) for path in (EMBEDDING, HEAD)}
    room = 1 + max(ids)
    if method.weight is not None:
        method = dataclasses.replace(method, trainable_token_indices=both)
    return method, room


def prepare_model(config: ConfigDict, mesh: Mesh) -> tuple[Transformer, PyTree, Method]:
    """The model, its adapted tree on the mesh, and the method.

    The tree is adapted anew, or by the folder `config.adapter`, whose whole modules then train too.
    """
    method, room = with_added_tokens(config, method_of(config))
    folder = model_folder(config.model)
    if method.weight is None and config.base.quantize != "none":
        raise UserError(
            f"config.base.quantize {config.base.quantize}: method {method.name} trains the base, and codes cannot be "
            "trained: take an adapter (configs/sft.py:qlora), or config.base.quantize=none"
        )
    options = _options(config, mesh)
    if config.adapter:
        model, params = load(folder, **options)
        method = trained_by(config, params, method)
        params = adapted(config, model.config, params, method)
    else:
        key = jax.random.key(config.seed)
        model, params = load_adapted(folder, method, key, vocabulary=room, **options)
    check_added_tokens(config, params)
    check_exportable(params, method)
    model = Transformer(fitted(model.config, params))
    return _as_run(config, model), jax.device_put(params, shardings(params, mesh)), method


def prepare_base(config: ConfigDict, mesh: Mesh) -> tuple[Transformer, PyTree]:
    """The model without an adapter, read once for several runs: its module, and its tree on the mesh."""
    model, params = load(model_folder(config.model), **_options(config, mesh))
    return _as_run(config, model), jax.device_put(params, shardings(params, mesh))


def adapt_base(
    config: ConfigDict, model: Transformer, params: PyTree, mesh: Mesh
) -> tuple[PyTree, Method]:
    """A run's own adapter over a base that it has in common with others, as `prepare_model` makes it.

    Raises UserError for a method that trains the base itself.
    """
    method = method_of(config)
    if method.weight is None:
        raise UserError(
            f"config.population: members share one base, and method {method.name} trains it: take an adapter"
        )
    if config.data.add_tokens:
        raise UserError(
            f"{ADDED}: members of config.population share one base, which has rows for its own tokens"
        )
    params = adapted(config, model.config, params, method)
    check_exportable(params, method)
    return jax.device_put(params, shardings(params, mesh)), method


def _options(config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """How `load` reads a run's base. Raises UserError where the mesh does not divide it."""
    require_divisible(model_config(model_folder(config.model)), mesh)
    return {
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "shardings": lambda path, shape: leaf_sharding(mesh, path, shape),
        "quantize": config.base.quantize,
        "group_size": config.base.group_size,
        "double_quant": config.base.double_quant,
    }


def _as_run(config: ConfigDict, model: Transformer) -> Transformer:
    return Transformer(dataclasses.replace(model.config, remat=config.remat))


def trained_by(config: ConfigDict, params: PyTree, method: Method) -> Method:
    """The method, under which what the folder `config.adapter` saved whole trains too."""
    if not config.adapter:
        return method
    tell_another_base(fetched(config.adapter), model_folder(config.model, weights=False))
    saved = saved_leaves(params, config.adapter)
    return dataclasses.replace(method, train_also=(*method.train_also, *saved))


def check_added_tokens(config: ConfigDict, params: PyTree) -> None:
    """UserError for a token of `config.data.add_tokens` that `config.adapter`, from which the run goes on, lacks."""
    if not config.adapter:
        return
    trained = {token for _, weight in weights_of(params) for token in getattr(weight, "tokens", ())}
    for text, token in zip(config.data.add_tokens, added_tokens(config), strict=True):
        if token not in trained:
            raise UserError(
                f"{ADDED}: {shown(text)} is no token that {config.adapter} trains: a run that goes on from an adapter "
                "adds none"
            )


def adapted(
    config: ConfigDict, model: Config, params: PyTree, method: Method, **starts: Any
) -> PyTree:
    """The tree adapted anew, or by the folder `config.adapter`. Works on abstract trees, under `jax.eval_shape`.

    `starts`, and `vocabulary`, are of `adapt`.
    """
    if config.adapter:
        return adopt(load_adapter(params, config.adapter), method, config.adapter)
    return adapt(params, method, jax.random.key(config.seed), names=module_names(model), **starts)
