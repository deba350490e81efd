"""Applies a row of the table of methods to a parameter tree, splits the tree by it, and merges it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import UserError, nearest, shown
from jaxft.methods import METHODS, Method
from jaxft.tree import (
    LAYERS,
    Patterns,
    PyTree,
    first_match,
    flatten_with_paths,
    in_layers,
    layer_starts,
    map_with_paths,
    matches,
    require_matches,
)
from jaxft.tree import partition as partition_tree
from jaxft.vocabulary import by_path, training_tokens, with_room
from jaxft.weights import (
    LoRA,
    LowRankStart,
    Saved,
    Site,
    Weight,
    bind,
    is_adapter,
    is_encoded,
    is_tied_head,
    is_weight,
    key_of,
    materialize,
    merged_one,
    of_the_model,
    quantized_in,
    remember,
    replace,
    require_rank,
    saved_in,
    start_of_dense,
    weights_of,
)

KERNELS = ("kernel", "embedding")
ALL_LINEAR = "all-linear"  # what PEFT calls all projections
PROJECTIONS = "*_proj"
Starts = Mapping[str, tuple[Any, Any, bool]]


def adapt(
    params: PyTree,
    method: Method,
    key: jax.Array,
    *,
    names: Mapping[str, str] | None = None,
    stacked: Sequence[str] = LAYERS,
    contracted: Patterns = (),
    starts: Starts | None = None,
    vocabulary: int = 0,
) -> PyTree:
    """Replaces every kernel that the method targets by a fresh adapter over it.

        before  q_proj: {kernel: W}
        after   q_proj: {kernel: LoRA(base=W, a, b, scale)}

    The base's arrays are taken over, not copied; a fresh adapter changes no output. The tree remembers the leaves of
    `train_also` (`weights.Saved`), which `save_adapter` then writes.

    Args:
        params: a parameter tree: jaxft's own or that of another Linen module.
        method: a row of the table, such as `jaxft.methods.lora(rank=16)`.
        key: the random key of the fresh adapters. Each path draws from a key of its own.
        names: {path: module name with {layer}}, in which `rank_pattern` and `alpha_pattern` are
            matched; by default the path with dots.
        stacked: patterns of the top-level names below which kernels have a leading axis of layers.
        contracted: (pattern, how many leading axes of the kernel are contracted) for kernels of more
            than two axes; 1 where nothing matches.
        starts: what `jaxft.load_adapted` found for a `method.init` over a quantized base: {path: (a, b,
            whether the base lacks s a b)}.
        vocabulary: tokens for which embedding and head get room, if they have fewer rows; under full tuning, which has
            no base, they become larger arrays.

    Raises:
        UserError: a target or pattern that matches nothing, with the nearest names; a `method.init` that needs the
            dense kernels of a quantized base, or the codes of a dense one.

    >>> import jaxft
    >>> tree = {"q_proj": {"kernel": jnp.ones((4, 6))}, "norm": {"scale": jnp.ones(4)}}
    >>> tree = adapt(tree, jaxft.methods.lora(rank=2), jax.random.key(0))
    >>> tree["q_proj"]["kernel"].a.shape, tree["q_proj"]["kernel"].b.shape
    ((4, 2), (2, 6))
    """
    _require_method(method, "adapt")
    params = with_room(params, vocabulary, dense=method.transform is None) if vocabulary else params
    if method.transform is None:
        return params
    sites = sites_of(params, method, key, names or {}, stacked, contracted)
    if method.init == "default":
        made = {site.path: method.transform(site) for site in sites}
    else:
        made = {site.path: _begun(site, method, starts or {}) for site in sites}
    adapted = map_with_paths(lambda path, leaf: made.get(path, leaf), params, is_leaf=is_weight)
    if method.trainable_token_indices:
        tokens = by_path(method.trainable_token_indices, params)
        adapted = training_tokens(adapted, tokens, dtype=jnp.dtype(method.dtype))
    adapted = remember(adapted, _trained_whole(adapted, method))
    return adapted | method.shared(sites, method.projection_seed) if method.shared else adapted


def _trained_whole(params: PyTree, method: Method) -> Saved:
    """The record of what belongs to the adapter besides its own arrays, whoever saves it."""
    also = [
        path
        for path, leaf in flatten_with_paths(params, is_leaf=is_weight)
        if not is_weight(leaf) and any(matches(pattern, path) for pattern in method.train_also)
    ]
    before = saved_in(params)
    whole = tuple(sorted({*before.whole, *((path, ()) for path in also)}))
    return dataclasses.replace(before, whole=whole, projection_seed=method.projection_seed)


def _begun(site: Site, method: Method, starts: Starts) -> Weight:
    """The adapter of a site under a `method.init`."""
    if site.path in starts:
        a, b, moved = starts[site.path]
    elif site.quantized:
        raise UserError(
            f"method.init {method.init}: {site.path} is quantized, and its dense values are needed: "
            "jaxft.load_adapted(folder, method, key, quantize=...) adapts the dense folder while it streams"
        )
    elif method.init == "loftq":
        raise UserError(
            f"method.init loftq makes up for quantizing, and {site.path} is dense: "
            "quantize the base (config.base.quantize), or take pissa"
        )
    else:
        require_rank(site, method.init)
        (a, b), moved = start_of_dense(site), False
    site = dataclasses.replace(site, start=(a, b))
    return LowRankStart.at(site, moved=moved) if moved or not site.quantized else LoRA.at(site)


def _require_method(method: Any, where: str) -> None:
    if not isinstance(method, Method):
        example = method if isinstance(method, str) and method in METHODS else "lora"
        raise UserError(
            f"{where} takes a method, such as jaxft.methods.{example}(), not {shown(method)}"
        )


def adopt(params: PyTree, method: Method, where: str) -> PyTree:
    """Makes the adapters read from a folder those of a method: their kind checked, its dropout set.

    Raises UserError where the folder holds another kind of adapter than the method trains.
    """

    def one(path: str, leaf: Any) -> Any:
        if not is_adapter(leaf) or leaf.trained:
            return leaf
        if type(leaf) is not method.weight and method.adopt is not None and type(leaf) is LoRA:
            leaf = method.adopt(leaf)
        if type(leaf) is not method.weight:
            wanted = method.weight.__name__ if method.weight else "no adapter"
            raise UserError(
                f"{where}: {path} is a {type(leaf).__name__} adapter, and method {method.name} trains {wanted}"
            )
        return replace(leaf, dropout=method.dropout)

    return map_with_paths(one, params, is_leaf=is_weight)


def trainable_patterns(params: PyTree, method: Method) -> list[tuple[str, bool]]:
    """The method's partition as (pattern, trains): each trainable part of each adapter, by its path.

    Raises:
        UserError: the tree has no weight of the method's kind, or another kind's.
    """
    if method.weight is None:
        return [(pattern, True) for pattern in method.trainable]
    paths = [path for path, _ in flatten_with_paths(params)]
    require_matches(method.train_also, paths, "method.train_also")
    parts = [
        (f"{path}/{part}", True)
        for path, weight in weights_of(params)
        if isinstance(weight, method.weight)
        for part in method.trainable
    ]
    if not parts:
        raise UserError(
            f"method {method.name}: the tree holds no {method.weight.__name__} weight; call jaxft.adapt first"
        )
    parts += [
        (f"{path}/{part}", True) for path, weight in weights_of(params) for part in weight.trained
    ]
    return parts + [(pattern, True) for pattern in method.train_also]


def partition(params: PyTree, method: Method | Patterns) -> tuple[PyTree, PyTree]:
    """Splits the tree into what trains and what is frozen: two of its shape with holes (None).

    Args:
        params: the tree, adapted.
        method: the method that adapted it, or a list of (pattern, trains), first match wins.

    Returns:
        (trainable, frozen); `jaxft.combine` puts them together.

    Raises:
        UserError: a quantized weight would train.
    """
    if isinstance(method, str):
        _require_method(method, "partition")
    patterns = trainable_patterns(params, method) if isinstance(method, Method) else method
    if not isinstance(method, Method):
        paths = [path for path, _ in flatten_with_paths(params)]
        require_matches([pattern for pattern, _ in patterns], paths, "partition")
    for path, weight in quantized_in(params):
        if first_match(patterns, f"{path}/codes", False):
            raise UserError(
                f"{path} is quantized ({weight.scheme}) and cannot train: train an adapter over it (method lora, "
                "dora, vera ...), or load the base without quantize"
            )
    return partition_tree(params, patterns)


def merge(params: PyTree) -> PyTree:
    """The same model without adapters: every weight materialized, in its base's dtype.

    A head tied to the embedding stays tied unless the embedding's adapter must not act in it, or the head
    has an adapter of its own: then it becomes an array of its own.
    """
    merged = jax.tree.map(
        lambda leaf: merged_one(leaf, params),
        params,
        is_leaf=is_weight,
    )
    return of_the_model(merged)


def base_tree(params: PyTree) -> PyTree:
    """The tree with each adapter replaced by its base, as it is: with `jaxft.save`, the folder that an adapter is of.

    That is another than the folder the base was read from where a `method.init` moved it (`moved_base`).
    """

    def one(leaf: Any) -> Any:
        leaf = leaf.base if is_adapter(leaf) else leaf
        plain = not is_weight(leaf) or is_encoded(leaf) or is_tied_head(leaf)
        return leaf if plain else materialize(leaf)  # rows that stand behind a base are part of it

    return of_the_model(jax.tree.map(one, params, is_leaf=is_weight))


def moved_base(params: PyTree) -> bool:
    """Whether the start of an adapter was taken off its base."""
    return any(getattr(weight, "moved", False) for _, weight in weights_of(params))


def bind_dropout(params: PyTree, key: jax.Array) -> PyTree:
    """Gives every adapter that has a dropout rate its key for this step; without it dropout is off."""
    return map_with_paths(
        lambda path, leaf: leaf.bind_dropout(key_of(key, path)) if is_weight(leaf) else leaf,
        params,
        is_leaf=is_weight,
    )


def _contracted(path: str, leaf: Any, in_stack: bool, said: Patterns) -> int:
    """How many axes of a kernel are contracted: what is said of its path, else one.

    Raises UserError for a stacked kernel of four axes of which nothing is said: it may be one of experts, whose first
    axis behind that of the layers is no input.
    """
    found = next((number for pattern, number in said if matches(pattern, path)), None)
    if found is None and in_stack and len(leaf.shape) > 3:
        raise UserError(
            f"{path} {tuple(leaf.shape)} is no stack of kernels (layers, in, out): leave it out of the targets, or say "
            "how many axes are contracted behind that of the layers, by `adapt(..., contracted=)`"
        )
    return 1 if found is None else found


def sites_of(
    params: PyTree,
    method: Method,
    key: jax.Array,
    names: Mapping[str, str],
    stacked: Sequence[str],
    contracted: Patterns,
) -> list[Site]:
    """Where the method adapts a tree, which may be one of shapes alone; the arguments are those of `adapt`.

    Raises:
        UserError: every target has rank 0.
    """
    kernels = {
        path: leaf
        for path, leaf in flatten_with_paths(params, is_leaf=is_weight)
        if path.split("/")[-1] in KERNELS and len(leaf.shape) >= 2
    }
    sites = []
    starts = layer_starts(params, is_weight)
    stacks = {path: leaf for path, leaf in kernels.items() if in_layers(path, stacked)}
    _require_layers(method, stacks, starts)
    modules_of = {}
    for path in targeted(method.targets, list(kernels), "method.targets"):
        leaf = kernels[path]
        in_stack = len(leaf.shape) > 2 and in_layers(path, stacked)
        first = starts.get(path.split("/")[0], 0)
        modules_of[path] = _modules(path, leaf, names, in_stack, first)
        ranks, scales = _ranks_and_scales(method, modules_of[path], first if in_stack else None)
        if any(ranks):
            sites.append(
                Site(
                    path=path,
                    base=leaf,
                    bound=bind(leaf, params),
                    key=key_of(key, path),
                    ranks=ranks,
                    scales=scales,
                    stacked=in_stack,
                    contracted=_contracted(path, leaf, in_stack, contracted),
                    embedding=path.split("/")[-1] == "embedding",
                    dtype=jnp.dtype(method.dtype),
                    dropout=method.dropout,
                    tie_adapters=method.tie_adapters,
                )
            )
    modules = [module for names in modules_of.values() for module in names]
    _require_fits(method.rank_pattern, modules, "method.rank_pattern")
    _require_fits(method.alpha_pattern, modules, "method.alpha_pattern")
    if not sites:
        raise UserError(f"method {method.name}: every target has rank 0; nothing would be adapted")
    return sites


def targeted(targets: Sequence[str], paths: Sequence[str], where: str) -> list[str]:
    """The paths that the user's patterns mean, or all projections, or where there are none all kernels."""
    if targets and tuple(targets) != (ALL_LINEAR,):
        require_matches(targets, paths, where)
        return [path for path in paths if any(matches(p, path) for p in targets)]
    chosen = [path for path in paths if matches(PROJECTIONS, path)]
    return chosen or [path for path in paths if path.split("/")[-1] == "kernel"]


def _modules(
    path: str, leaf: Any, names: Mapping[str, str], in_stack: bool, first: int
) -> list[str]:
    """The module's name in each layer: the family's, or by default the path with dots."""
    parents = path.split("/")[:-1]
    template = names.get(
        path, ".".join([*parents[:1], *(["{layer}"] if in_stack else []), *parents[1:]])
    )
    count = leaf.shape[0] if in_stack else 1
    return [template.format(layer=layer) for layer in range(first, first + count)]


def _fits(pattern: str, module: str) -> bool:
    """Whether the regular expression fits the end of a module's name from a dot on, as in PEFT."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as error:
        raise UserError(f"method: pattern {pattern!r} is no regular expression: {error}") from None


def _require_fits(patterns: Mapping[str, Any], modules: Sequence[str], where: str) -> None:
    for pattern in patterns:
        if not any(_fits(pattern, module) for module in modules):
            hint = nearest(pattern, [*modules, *(module.split(".")[-1] for module in modules)])
            raise UserError(
                f"{where}: {pattern!r} fits no adapted module{hint or f', such as {modules[0]!r}'}"
            )


def _require_layers(method: Method, stacks: Mapping[str, Any], starts: Mapping[str, int]) -> None:
    """UserError where `layers_to_transform` names a layer that none of these stacked kernels has."""
    ends = [
        starts.get(path.split("/")[0], 0) + leaf.shape[0]
        for path, leaf in stacks.items()
        if len(leaf.shape) > 2
    ]
    beyond = [
        layer for layer in method.layers_to_transform if not 0 <= layer < max(ends, default=0)
    ]
    if ends and beyond:
        raise UserError(
            f"method.layers_to_transform: no layer {beyond[0]}; the model has 0 to {max(ends) - 1}"
        )


def _ranks_and_scales(
    method: Method, modules: Sequence[str], first: int | None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Each layer's rank and factor s; both 0 in a layer that is left out. `first` is None of a kernel in no layer."""
    chosen = method.layers_to_transform
    ranks, scales = [], []
    for layer, module in enumerate(modules, first or 0):
        rank = next((r for p, r in method.rank_pattern.items() if _fits(p, module)), method.rank)
        alpha = next((x for p, x in method.alpha_pattern.items() if _fits(p, module)), method.alpha)
        if chosen and (first is None or layer not in chosen):
            rank = 0
        ranks.append(rank)
        scales.append(alpha / (rank**0.5 if method.rank_stabilized else rank) if rank else 0.0)
    return tuple(ranks), tuple(scales)
