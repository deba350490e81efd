"""Weights as bitsandbytes stores them (0.43 and later): read and written without going through floats.

A kernel of 4 bits is `NAME.weight`, uint8 (bytes, 1), two codes a byte over the flattened (out, in) weight, the
first in the high half (the same bytes as (n, 1) of bfloat16, float16 or float32 where FSDP wrote them:
`bnb_4bit_quant_storage`); beside it `.absmax`, `.quant_map`, `.nested_absmax`, `.nested_quant_map` and
`.quant_state.bitsandbytes__nf4`, a JSON text as bytes. A kernel of 8 bits is int8 (out, in) with a `NAME.SCB`, (out,).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.errors import UserError, shown
from jaxft.formats.integers import pack_halves
from jaxft.formats.safetensors import Lazy, Stored
from jaxft.runtime.untrusted import parse_object
from jaxft.weights import Flattened, Quantized, Weight
from jaxft.weights.quantized.codebooks import TABLES, dynamic_table
from jaxft.weights.quantized.rounding import NESTED

DEFAULT_BLOCK = (
    64  # bitsandbytes' own, which transformers neither changes nor writes into config.json
)
STATE = ".quant_state.bitsandbytes__"
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
INT8_LARGEST = 127.0


def check(settings: Mapping[str, Any], where: str) -> None:
    """Nothing: what is read and what is not stands beside each kernel."""


def parts_of(stored: Mapping[str, Stored], name: str) -> list[str]:
    """The names of the tensors that make up a quantized `name`; none if it is dense."""
    column = name.removesuffix(".weight") + ".SCB"
    found = [other for other in stored if other.startswith(f"{name}.")]
    if column in stored:
        found += [
            other
            for other in (column, f"{column.removesuffix('SCB')}weight_format")
            if other in stored
        ]
    return [*found, name] if found and name in stored else []


def block_size(stored: Mapping[str, Stored]) -> int:
    """The block of the first kernel of 4 bits there; bitsandbytes' own where there is none."""
    for name, tensor in stored.items():
        if STATE in name:
            found = parse_object(tensor.read().tobytes(), f"{tensor.file}: {name}").get("blocksize")
            return found if found in BLOCKS else DEFAULT_BLOCK
    return DEFAULT_BLOCK


def read_layers(
    settings: Mapping[str, Any],
    stored: Mapping[str, Stored],
    names: Sequence[str],
    shape: tuple[int, ...],
    dtype: Any,
) -> Iterator[Weight]:
    """The kernels (in, out) of a leaf's layers."""
    return (read_weight(stored, name, shape, dtype) for name in names)


def read_weight(
    stored: Mapping[str, Stored], name: str, shape: tuple[int, ...], dtype: Any
) -> Weight:
    """One quantized kernel (in, out), its parts NumPy arrays.

    Raises UserError where a part is missing, of another shape, or uses another code than bitsandbytes' own.
    """
    column = name.removesuffix(".weight") + ".SCB"
    if column in stored:
        codes = _read(stored, name, shape[::-1], "I8").T
        scales = _read(stored, column, shape[1:], "F32")[None] / np.float32(INT8_LARGEST)
        return Quantized(codes, scales, scheme="int8", matrix_shape=shape, dense_dtype=dtype)
    states = [other for other in parts_of(stored, name) if other.startswith(name + STATE)]
    if len(states) != 1:
        raise UserError(f"{stored[name].file}: {name}: no single {STATE[1:]}nf4 or fp4 beside it")
    state = parse_object(stored[states[0]].read().tobytes(), f"{stored[name].file}: {states[0]}")
    scheme, block = state.get("quant_type"), state.get("blocksize")
    if scheme not in TABLES or block not in BLOCKS or not isinstance(state.get("shape"), list):
        raise UserError(
            f"{stored[name].file}: {states[0]}: {shown(scheme)} in blocks of {shown(block)}: jaxft reads "
            f"{' and '.join(TABLES)} in blocks of {BLOCKS[0]} to {BLOCKS[-1]}"
        )
    if tuple(state["shape"]) != shape[::-1]:
        raise UserError(
            f"{stored[name].file}: {name} has shape {state['shape']}, the model needs {list(shape[::-1])}"
        )
    size = math.prod(shape)
    packed = _octets(stored[name], -(-size // 2))
    flat = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:size]
    blocks = -(-size // block)
    _same_table(stored, f"{name}.quant_map", TABLES[scheme])
    scales, nested, mean = _read_scales(stored, name, state, blocks)
    settings = {"scheme": scheme, "dense_dtype": dtype, "nested": nested, "mean": mean}
    rows, columns = shape
    if rows % block == 0 and rows % 2 == 0:
        codes, scales = flat.reshape(columns, rows).T, scales.reshape(columns, -1).T
        return Quantized(pack_halves(codes), scales, matrix_shape=shape, **settings)
    zero = int(np.flatnonzero(TABLES[scheme] == 0)[0])
    padded = np.pad(flat, (0, blocks * block - size), constant_values=zero).reshape(blocks, block)
    inner = Quantized(pack_halves(padded.T), scales[None], matrix_shape=(block, blocks), **settings)
    return Flattened(inner, matrix_shape=shape)


def _read_scales(
    stored: Mapping[str, Stored], name: str, state: Mapping[str, Any], blocks: int
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """(scales or their codes, the nested largest magnitudes, the mean)."""
    if "nested_blocksize" not in state:
        return _read(stored, f"{name}.absmax", (blocks,), "F32"), None, None
    if state["nested_blocksize"] != NESTED:
        raise UserError(
            f"{stored[name].file}: {name}: nested blocks of {state['nested_blocksize']}; jaxft reads {NESTED}"
        )
    _same_table(stored, f"{name}.nested_quant_map", dynamic_table())
    codes = _read(stored, f"{name}.absmax", (blocks,), "U8")
    nested = _read(stored, f"{name}.nested_absmax", (-(-blocks // NESTED),), "F32")
    return codes, nested, np.asarray(state["nested_offset"], np.float32)


def _octets(found: Stored, count: int) -> np.ndarray:
    """The bytes of a kernel's codes, whichever dtype stores them."""
    if found.nbytes != count or found.shape[1:] != (1,):
        raise UserError(
            f"{found.file}: {found.name} is {found.dtype} {list(found.shape)}; {count} bytes in one column, "
            "of U8, BF16, F16 or F32, are expected"
        )
    return np.ascontiguousarray(found.read()).view(np.uint8).reshape(-1)


def _read(
    stored: Mapping[str, Stored], name: str, shape: tuple[int, ...], dtype: str
) -> np.ndarray:
    if name not in stored:
        raise UserError(f"the tensor {name} is missing, which a quantized kernel needs")
    found = stored[name]
    if found.shape != shape or found.dtype != dtype:
        raise UserError(
            f"{found.file}: {name} is {found.dtype} {list(found.shape)}; {dtype} {list(shape)} is expected"
        )
    return found.read()


def _same_table(stored: Mapping[str, Stored], name: str, table: np.ndarray) -> None:
    if not np.allclose(_read(stored, name, table.shape, "F32"), table, rtol=1e-6, atol=1e-9):
        raise UserError(f"{stored[name].file}: {name} is another code than bitsandbytes' own")


def _flat_codes(weight: Quantized) -> np.ndarray:
    """The codes in the order of the flattened (out, in) weight."""
    packed = np.asarray(weight.divided(1).codes)
    return np.concatenate([packed & 15, packed >> 4]).T.reshape(-1)


def check_writable(weight: Any) -> None:
    """Raises UserError for a weight that bitsandbytes has no format for."""
    if weight.scheme == "int8" and weight.zeros is None and weight.group_size == weight.shape[-2]:
        return
    if weight.scheme in TABLES and weight.group_size in BLOCKS:
        return
    raise UserError(
        f"{weight.scheme} in groups of {weight.group_size}: bitsandbytes' format holds nf4 and fp4 in blocks of "
        f"{', '.join(map(str, BLOCKS[:3]))} ... and int8 with a group of -1"
    )


def written(name: str, weight: Any) -> dict[str, Lazy]:
    """{name on disk: tensor} of one layer's quantized weight (abstract shapes are read, values when written)."""
    rows, columns = weight.shape[-2:]
    if weight.scheme == "int8":
        column = name.removesuffix(".weight")
        scb = lambda: np.asarray(weight.scales)[0] * np.float32(INT8_LARGEST)  # noqa: E731
        return {
            name: Lazy((columns, rows), np.dtype("int8"), lambda: np.asarray(weight.codes).T),
            f"{column}.SCB": Lazy((columns,), np.dtype("float32"), scb),
            f"{column}.weight_format": Lazy((), np.dtype("uint8"), lambda: np.zeros((), np.uint8)),
        }
    inner = getattr(weight, "blocks", weight)
    size = rows * columns
    blocks = math.prod(inner.scales.shape)

    def packed() -> np.ndarray:
        flat = _flat_codes(inner)[:size]
        flat = np.pad(flat, (0, size % 2))
        return ((flat[::2] << 4) | flat[1::2])[:, None]

    state: dict[str, Any] = {
        "quant_type": weight.scheme,
        "blocksize": weight.group_size,
        "dtype": str(np.dtype(weight.dtype)),
        "shape": [columns, rows],
    }
    table = TABLES[weight.scheme]
    tensors = {
        name: Lazy((-(-size // 2), 1), np.dtype("uint8"), packed),
        f"{name}.absmax": Lazy(
            (blocks,), np.dtype(inner.scales.dtype), lambda: np.asarray(inner.scales).T.reshape(-1)
        ),
        f"{name}.quant_map": Lazy(table.shape, table.dtype, lambda: table),
    }
    if inner.nested is not None:
        nested = dynamic_table()
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32"}
        state["nested_offset"] = float(np.asarray(inner.mean))
        tensors[f"{name}.nested_absmax"] = Lazy(
            tuple(inner.nested.shape), np.dtype("float32"), lambda: np.asarray(inner.nested)
        )
        tensors[f"{name}.nested_quant_map"] = Lazy(nested.shape, nested.dtype, lambda: nested)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[f"{name}{STATE}{weight.scheme}"] = Lazy(text.shape, text.dtype, lambda: text)
    return tensors


def config_of(
    weight: Any, dtype: str, skipped: Sequence[str], before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The `quantization_config` of a folder that holds such weights.

    Args:
        weight: one of them.
        dtype: of the computation, where `before` names none.
        skipped: the modules that are not quantized.
        before: what the folder says from which the model was read, if bitsandbytes quantized it.
    """
    eight = weight.scheme == "int8"
    settings = {
        "bnb_4bit_compute_dtype": dtype,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_threshold": 6.0,
        **(before or {}),
    }
    return settings | {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": not eight,
        "_load_in_8bit": eight,
        "load_in_4bit": not eight,
        "load_in_8bit": eight,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4" if eight else weight.scheme,
        "bnb_4bit_use_double_quant": weight.nested is not None,
        "llm_int8_skip_modules": list(skipped),
    }


def skip_list(
    dense: Collection[str], quantized: Collection[str], before: Mapping[str, Any] | None
) -> list[str]:
    """The list by which transformers leaves these modules dense and takes those for quantized.

    The list of the folder from which the model was read, where that still says so, else the modules' names.
    """
    own = (before or {}).get("llm_int8_skip_modules")
    if isinstance(own, list):
        left_out = functools.partial(_left_out, [str(one) for one in own])
        if all(map(left_out, dense)) and not any(map(left_out, quantized)):
            return own
    return sorted(dense)


def _left_out(patterns: Sequence[str], module: str) -> bool:
    """As transformers matches: the beginning of a name up to a dot, or the end of a name."""
    parts = module.split(".")
    beginnings = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return any(pattern in beginnings or module.endswith(pattern) for pattern in patterns)
