"""Banks of adapters: many versions of one base in one tree, of which each row of a batch has its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxft.adaptation import base_tree, targeted
from jaxft.errors import UserError, counted
from jaxft.formats.peft import load_adapter
from jaxft.methods import known_dtype
from jaxft.tree import flatten_with_paths
from jaxft.weights import is_adapter, is_weight, slots_of, stacked, written

Adapted = str | Path | Mapping[str, Any]


def stack_adapters(
    params: Mapping[str, Any],
    adapters: Mapping[str, Adapted],
    *,
    slots: int = 0,
    rank: int = 0,
    targets: Sequence[str] = (),
    dora: bool = False,
    dtype: str = "float32",
) -> dict[str, Any]:
    """A bank: the base's tree with all these adapters in it, of which each row of a batch has its own.

        bank = jaxft.stack_adapters(params, {"a": "peft_a", "b": "peft_b"})
        jaxft.generate(model, bank, prompts, adapters=["a", "b", None], tokenizer=...)

    LoRA, rsLoRA, LoRA-FA, DoRA, VeRA and Delta-LoRA mix, with any ranks and targets; smaller ranks are padded, which is
    exact. The base's arrays are taken over, not copied, be they dense, quantized or sharded. To apply a model to the
    bank, say each row's adapter: `model.apply({"params": jaxft.bind_groups(bank, groups)}, tokens)`.

    Args:
        params: the base's tree, without adapters.
        adapters: {name: a PEFT folder (a path or URL), or the base's tree with adapters}.
        slots: how many adapters the bank has room for, at least as many as are given.
        rank: the least rank of its arrays: room for adapters that `put_adapter` brings later.
        targets: patterns of kernels that have room even if none of these adapters targets them ("all-linear": all
            projections).
        dora: whether there is room for DoRA even if none of these is.
        dtype: of the adapters' arrays.

    Raises:
        UserError: no adapter and no slot, a tree that is adapted already, a folder that `load_adapter` refuses, an
            adapter over another base, with leaves saved whole, or of a kind that a bank does not hold.
    """
    leaves = dict(flatten_with_paths(params, is_leaf=is_weight))
    for path, leaf in leaves.items():
        if is_adapter(leaf):
            raise UserError(f"stack_adapters: {path} is adapted already: give the base's tree")
    if not adapters and not slots:
        raise UserError("stack_adapters: no adapter is given, and no slots for any")
    kernels = [path for path in leaves if path.split("/")[-1] in ("kernel", "embedding")]
    paths = targeted(targets, kernels, "stack_adapters: targets") if targets else ()
    trees = {name: _tree(params, one, dtype) for name, one in adapters.items()}
    kind = known_dtype(dtype, "stack_adapters")
    room = {"slots": slots, "rank": rank, "paths": paths, "ratios": dora, "dtype": kind}
    return stacked(params, trees, **room)


def put_adapter(
    bank: Mapping[str, Any],
    name: str | None,
    adapter: Adapted | None,
    *,
    index: int | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """The bank with an adapter at an index; the arrays keep their shapes, so that no program is compiled again.

    Args:
        bank: of `stack_adapters`, whose `slots`, `rank`, `targets` and `dora` say what there is room for.
        name: what `generate(adapters=...)` calls it; None, with `adapter` None too, makes room.
        adapter: a PEFT folder, or a tree over the same base.
        index: where; by default where that name is, else the first index where there is room.
        dtype: in which a folder is read.

    Raises:
        UserError: a full bank, an index or a rank beyond the bank's, a name that another index has, or an adapter that
            the bank has no room for.
    """
    slots = slots_of(bank)
    if (name is None) != (adapter is None):
        raise UserError("put_adapter: a name and an adapter go together; None and None make room")
    if index is None:
        index = slots.names.index(name) if name in slots.names else slots.free()
    if index is None:
        raise UserError(
            f"put_adapter: all {counted(len(slots.names), 'slot')} of the bank are taken"
        )
    if not 0 <= index < len(slots.names):
        raise UserError(f"put_adapter: the bank has no index {index}: 0 to {len(slots.names) - 1}")
    if name is not None and name in slots.names and slots.names.index(name) != index:
        raise UserError(f"put_adapter: {name!r} is at index {slots.names.index(name)} already")
    tree = None if adapter is None else _tree(base_tree(bank), adapter, dtype)
    return written(bank, index, tree, name)


def _tree(params: Mapping[str, Any], adapter: Adapted, dtype: str) -> Mapping[str, Any]:
    if isinstance(adapter, Mapping):
        return adapter
    return load_adapter(params, adapter, dtype=dtype)
