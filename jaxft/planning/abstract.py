"""The adapted tree that a run would load, as shapes: from config.json, with no weight made or read."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxft.assets import model_folder
from jaxft.errors import UserError
from jaxft.formats.bitsandbytes import DEFAULT_BLOCK, block_size
from jaxft.formats.config_file import read_config
from jaxft.formats.layout import laid_out_as_stored
from jaxft.formats.low_rank_starts import shapes_of_starts
from jaxft.formats.prequantized import quantization_settings, refuse_quantized
from jaxft.formats.safetensors import index_name, open_folder
from jaxft.methods import Method
from jaxft.models import Config, module_names
from jaxft.models.transformer import initial_params
from jaxft.quantizing import quantize_params
from jaxft.runtime.untrusted import exists
from jaxft.training.setup import adapted, method_of, trained_by, with_added_tokens
from jaxft.training.sharding import leaf_sharding
from jaxft.tree import PyTree
from jaxft.weights import quantized_in
from jaxft.weights.placement import divided_as


def abstract_base(config: ConfigDict, model: Config, mesh: Mesh) -> PyTree:
    """The tree that `jaxft.load` gives the run, as shapes.

    Raises UserError where config.json says that the folder is quantized already and the configuration quantizes it.
    """
    folder, base = model_folder(config.model, weights=False), config.base
    raw, where = read_config(folder), str(folder / "config.json")
    settings = quantization_settings(raw, where)
    if settings is not None:
        if base.quantize != "none":
            refuse_quantized(settings["quant_method"], str(folder))
        if settings["quant_method"] == "bitsandbytes":
            settings = {**settings, "blocksize": _stored_block(folder)}

    def fresh() -> PyTree:
        params = initial_params(model, jax.random.key(0), jnp.dtype(config.param_dtype))
        if settings is not None:
            params = laid_out_as_stored(params, model, settings, where)
        if base.quantize != "none":
            params = quantize_params(
                params, base.quantize, group_size=base.group_size, double_quant=base.double_quant
            )
        return divided_as(params, functools.partial(leaf_sharding, mesh))

    return jax.eval_shape(fresh)


def _stored_block(folder: Path) -> int:
    """The block of a folder of bitsandbytes: as it is stored where the weights are there, or else the default."""
    if not any(exists(folder / name) for name in ("model.safetensors", index_name())):
        return DEFAULT_BLOCK
    return block_size(open_folder(folder))


def abstract_params(config: ConfigDict, model: Config, mesh: Mesh) -> tuple[Method, PyTree]:
    """(the method, the adapted tree as shapes). Raises UserError for what the run would refuse."""
    method, room = with_added_tokens(config, method_of(config))
    if method.weight is None and config.base.quantize != "none":
        raise UserError(f"method {method.name} trains the base: config.base.quantize must be none")
    base = abstract_base(config, model, mesh)
    method = trained_by(config, base, method)

    def fresh(params: PyTree) -> PyTree:
        as_stored = config.base.quantize == "none" and quantized_in(params)
        starts = {} if as_stored else shapes_of_starts(params, method, module_names(model))
        return adapted(config, model, params, method, starts=starts, vocabulary=room)

    return method, jax.eval_shape(fresh, base)
