"""Weights inside Flax modules that jaxft did not write: a context under which their layers multiply by `contract`.

    params = model.init(key, x)["params"]                       # another author's Linen module
    params = jaxft.adapt(params, method, key)                   # its kernels are weights now
    with jaxft.adapted():
        y = model.apply({"params": jaxft.bind(params, params)}, x)

`bind` fills in what weights share (VeRA's projections); for the other methods it changes nothing. Flax
leaves the extra entry `vera` at the top of the tree alone. Layers under `nn.scan` take every method but
VeRA, whose shared projections have no axis of layers to scan over.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.errors import UserError
from jaxft.weights import contract, contract_transposed, is_weight, take


@contextlib.contextmanager
def adapted() -> Iterator[None]:
    """Makes Linen's own layers use the weights that stand in place of their kernels.

    Inside it `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum` and `nn.Embed` (its `attend` too) whose parameter is a
    weight multiply by `contract`, `take` or `contract_transposed`; a layer whose parameter is an array runs
    untouched. Kernels of more than two axes are contracted over their leading axes: say how many by
    `adapt(..., contracted=(("out", 2),))` where it is not one.

    Raises:
        UserError: (when a module is applied) a weight in a layer of another kind, or in one of these used in a
            way that is no product of a matrix: batched axes, or an equation that contracts later axes.

    >>> import jaxft
    >>> layer, x = nn.Dense(6), jnp.ones((2, 4))
    >>> params = layer.init(jax.random.key(0), x)["params"]
    >>> adapter = jaxft.adapt(params, jaxft.methods.lora(rank=2), jax.random.key(1))
    >>> with jaxft.adapted():
    ...     y = layer.apply({"params": adapter}, x)
    >>> bool(jnp.allclose(y, layer.apply({"params": params}, x)))
    True
    """
    with nn.intercept_methods(_intercept):
        yield


def _intercept(
    call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    module, method = context.module, context.method_name
    if module.scope is None or method == "setup":
        return call(*args, **kwargs)
    held = module.scope.variables().get("params", {})
    weights = [name for name, leaf in held.items() if is_weight(leaf)]
    if not weights:
        return call(*args, **kwargs)
    product, path = PRODUCTS.get((type(module), method)), "/".join((*module.path, weights[0]))
    if product is None:
        known = ", ".join(dict.fromkeys(layer.__name__ for layer, _ in PRODUCTS))
        raise UserError(
            f"{path}: jaxft.adapted knows no {type(module).__name__}.{method} with an adapted weight;"
            f" it knows {known}"
        )
    if getattr(held[weights[0]], "a", ()) is None:
        raise UserError(
            f"{path}: what the adapters share is not bound: pass jaxft.bind(params, params)"
        )
    return product(module, held, *args, **kwargs)


def _promoted(module: nn.Module, x: jax.Array, weight: Any, bias: Any) -> tuple[jax.Array, Any]:
    """The input and the bias in the dtype in which Flax would compute."""
    dtype = module.dtype
    if dtype is None:
        dtype = jnp.result_type(x.dtype, weight.dtype, *([] if bias is None else [bias.dtype]))
    return x.astype(dtype), None if bias is None else bias.astype(dtype)


def _dense(module: nn.Dense, held: Any, x: jax.Array) -> jax.Array:
    x, bias = _promoted(module, x, held["kernel"], held.get("bias"))
    return _biased(contract(x, held["kernel"]), bias)


def _dense_general(module: nn.DenseGeneral, held: Any, x: jax.Array) -> jax.Array:
    """The contracted axes go last and are flattened; the product's last axis is unfolded."""
    if module.batch_dims:
        raise _refused(module, "batched axes are no product with one matrix")
    axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    axes = tuple(axis % x.ndim for axis in axes)
    features = (module.features,) if isinstance(module.features, int) else tuple(module.features)
    x, bias = _promoted(module, x, held["kernel"], held.get("bias"))
    return _folded(module, x, held["kernel"], axes, features, bias)


def _einsum(module: nn.Einsum, held: Any, x: jax.Array, einsum_str: str | None = None) -> jax.Array:
    """Equations in which the kernel's leading axes are summed and the rest stand last in the result."""
    equation = (module.einsum_str or einsum_str or "").replace(" ", "")
    inputs, rest = equation.split(",", 1)
    letters, result = rest.split("->")
    batch = inputs.replace("...", "")
    summed = [letter for letter in letters if letter in batch]
    kept = [letter for letter in letters if letter not in batch]
    lasting = "".join(letter for letter in inputs if letter not in summed)
    if list(letters) != summed + kept or result != lasting + "".join(kept):
        raise _refused(module, f"the equation {equation} is no product with a matrix (in, out)")
    front = (
        batch.index
        if not inputs.startswith("...")
        else lambda letter: batch.index(letter) - len(batch)
    )
    axes = tuple(front(letter) % x.ndim for letter in summed)
    features = tuple(held["kernel"].shape[len(summed) :])
    x, bias = _promoted(module, x, held["kernel"], held.get("bias"))
    return _folded(module, x, held["kernel"], axes, features, bias)


def _folded(
    module: nn.Module,
    x: jax.Array,
    kernel: Any,
    axes: tuple[int, ...],
    features: tuple[int, ...],
    bias: Any,
) -> jax.Array:
    """The product over several axes of x at once: (..., in1, in2) by (in1, in2, out1, out2)."""
    rows, made = math.prod(x.shape[axis] for axis in axes), getattr(kernel, "a", None)
    if made is not None and made.shape[-2] != rows:
        raise _refused(
            module,
            f"its kernel is contracted over {len(axes)} axes: say so by `adapt(..., contracted=)`",
        )
    lasting = tuple(axis for axis in range(x.ndim) if axis not in axes)
    x = x.transpose(*lasting, *axes).reshape(*(x.shape[axis] for axis in lasting), rows)
    y = contract(x, kernel)
    return _biased(y.reshape(*y.shape[:-1], *features), bias)


def _biased(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


def _embed(module: nn.Embed, held: Any, ids: jax.Array) -> jax.Array:
    rows = take(held["embedding"], ids)
    return rows if module.dtype is None else rows.astype(module.dtype)


def _attend(module: nn.Embed, held: Any, query: jax.Array) -> jax.Array:
    query, _ = _promoted(module, query, held["embedding"], None)
    return contract_transposed(query, held["embedding"])


def _refused(module: nn.Module, reason: str) -> UserError:
    return UserError(f"{'/'.join(module.path)}: jaxft.adapted: {reason}")


PRODUCTS: dict[tuple[type[nn.Module], str], Callable[..., jax.Array]] = {
    (nn.Dense, "__call__"): _dense,
    (nn.DenseGeneral, "__call__"): _dense_general,
    (nn.Einsum, "__call__"): _einsum,
    (nn.Embed, "__call__"): _embed,
    (nn.Embed, "attend"): _attend,
}
