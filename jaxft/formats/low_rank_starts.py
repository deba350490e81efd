"""A folder read and adapted at once: where an adapter's start needs the dense kernels that a quantized base loses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.adaptation import Starts, adapt, sites_of
from jaxft.assets import model_folder
from jaxft.errors import UserError
from jaxft.formats.bitsandbytes import check_writable
from jaxft.formats.config_file import model_config
from jaxft.formats.huggingface import load
from jaxft.formats.streamed import round_kernel
from jaxft.methods import Method
from jaxft.models import Transformer, module_names
from jaxft.models.transformer import initial_params
from jaxft.tree import LAYERS, PyTree
from jaxft.weights import Site, Weight, alternate, require_rank, stacked_start

Rounding = Callable[[np.ndarray], Weight]


def load_adapted(
    folder: str | Path,
    method: Method,
    key: jax.Array,
    *,
    quantize: str = "none",
    vocabulary: int = 0,
    **options: Any,
) -> tuple[Transformer, PyTree]:
    """`load` and then `adapt`; under a `method.init` over a quantized base layer by layer while the folder streams.

    Each kernel is dense when it comes from the file: there its a, b and codes are computed (by NumPy, on the host),
    and the dense values are dropped. The host never holds the dense model.

    Args:
        folder: as of `load`.
        method: a row of the table.
        key: as of `adapt`.
        quantize: as of `load`.
        vocabulary: as of `adapt`.
        options: the others of `load`.

    Returns:
        (model, adapted tree).

    Raises:
        UserError: what `load` and `adapt` raise; a folder that is quantized already; a base moved by the start that
            bitsandbytes' format, in which it has to be written beside the adapter, cannot hold.
    """
    if method.init == "default" or quantize == "none":
        model, params = load(folder, quantize=quantize, **options)
        names = module_names(model.config)
        return model, adapt(params, method, key, names=names, vocabulary=vocabulary)
    path = model_folder(folder)
    config = model_config(path)
    names = module_names(config)
    abstract = jax.eval_shape(lambda: initial_params(config, jax.random.key(0)))
    sites = {site.path: site for site in sites_of(abstract, method, key, names, LAYERS, ())}
    found: dict[str, dict[int, Any]] = {}
    settings = {name: options[name] for name in ("group_size", "double_quant") if name in options}
    rounding: Rounding = functools.partial(round_kernel, scheme=quantize, **settings)

    def rounder(leaf: str, layer: int, kernel: np.ndarray) -> Weight:
        rank = sites[leaf].ranks[layer] if leaf in sites else 0
        if not rank:
            return rounding(kernel)
        require_rank(sites[leaf], method.init)
        base, factors = alternate(kernel, rank, method.init, method.init_iterations, rounding)
        if _moves(method):
            _require_writable(base, method)
        found.setdefault(leaf, {})[layer] = factors
        return base

    model, params = load(folder, quantize=quantize, rounder=rounder, **options)
    starts = _starts(sites, found, method)
    return model, adapt(params, method, key, names=names, starts=starts, vocabulary=vocabulary)


def _moves(method: Method) -> bool:
    """Whether the base that the start leaves is another than the quantized folder."""
    return method.init == "pissa" or method.init_iterations > 1


def _require_writable(base: Weight, method: Method) -> None:
    try:
        check_writable(base)
    except UserError as error:
        raise UserError(
            f"method.init {method.init}: the base that it leaves has to be written beside the adapter, and {error}"
        ) from error


def shapes_of_starts(params: PyTree, method: Method, names: Mapping[str, str]) -> Starts:
    """What `load_adapted` gives `adapt` as starts, without a matrix decomposed: for a tree of shapes, under tracing.

    Raises UserError for what it refuses: a rank that a kernel has not, a moved base that cannot be written.
    """
    if method.init == "default":
        return {}
    starts = {}
    for site in sites_of(params, method, jax.random.key(0), names, LAYERS, ()):
        if site.quantized or method.init == "pissa":
            require_rank(site, method.init)
            if site.quantized and _moves(method):
                _require_writable(site.base, method)
            starts[site.path] = (*stacked_start(site, {}), site.quantized and _moves(method))
    return starts


def _starts(
    sites: Mapping[str, Site], found: Mapping[str, Mapping[int, Any]], method: Method
) -> Starts:
    return {
        path: (*stacked_start(sites[path], factors), _moves(method))
        for path, factors in found.items()
    }
