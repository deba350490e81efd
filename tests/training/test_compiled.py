"""What the compiled step sends between devices, read from the program: for TPUs if `libtpu` is there, and CPUs."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import re
from typing import Any

import jax
import pytest

from jaxft.models.config import Config

from .compiled import (
    LLAMA_8B,
    Collective,
    bodies_in,
    collectives_in,
    compile_step,
    devices_of,
    mesh_of,
    standing_in,
)

# A program for absent TPUs is kept by JAX's cache and cannot be read back: it is then compiled again.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
TPU = importlib.util.find_spec("libtpu") is not None
needs_tpu_compiler = pytest.mark.skipif(not TPU, reason="needs libtpu")
PLATFORMS = ["cpu", pytest.param("tpu", marks=needs_tpu_compiler)]
RANK = 16
MODEL = Config(
    family="llama", vocabulary=1024, hidden=256, intermediate=640, layers=4, heads=4, key_heads=2,
    head_dim=128, max_length=512, dtype="bfloat16", remat="dots",
)  # fmt: skip
KERNELS = {(256, 512), (256, 256), (512, 256), (256, 640), (640, 256)}
PROJECTIONS = 7
# What adapters multiply an input by first stands together where they read the same: of q, k and v, of gate and up.
ADAPTERS = {RANK, 2 * RANK, 3 * RANK}
REDUCED = 4 + PROJECTIONS  # such an a of each input, and each b
CASES = [
    *((platform, method) for platform in ("cpu", "tpu") for method in ("lora", "dora", "vera")),
    (
        "tpu",
        "qlora",
    ),  # the CPU's compiler gathers as the TPU's does not, and takes long for the codes
]
CASES = [
    pytest.param(*case, marks=needs_tpu_compiler) if case[0] == "tpu" else case for case in CASES
]


@functools.cache
def fsdp_collectives(platform: str, method: str) -> list[Collective]:
    """Those of the step over fsdp = 8."""
    devices: Any = jax.devices() if platform == "cpu" else devices_of("v5e:2x4", "v5litepod-8")
    settings = {"method.rank": RANK}
    compiled = compile_step(MODEL, mesh_of(devices, fsdp=8), method, rows=8, length=256, **settings)
    return collectives_in(compiled.as_text())


def shapes_of(
    found: list[Collective], *kinds: str, in_loop: bool | None = None
) -> list[tuple[int, ...]]:
    """The shapes that collectives of these kinds give, without axes of size 1."""
    return [
        tuple(size for size in shape if size != 1)
        for one in found
        if one.kind in kinds and in_loop in (None, one.in_loop)
        for _, shape in one.shapes
    ]


@pytest.mark.parametrize(("platform", "method"), CASES)
def test_no_gradient_of_a_frozen_weight_is_reduced(platform: str, method: str) -> None:
    """What is reduced is scalars, vectors and a's and b's; each a and b once, in the loop over the layers.

    Vectors of all layers may be reduced at once, behind the loop.
    """
    found = fsdp_collectives(platform, method)
    reduced = shapes_of(found, "all-reduce", "reduce-scatter")
    assert reduced
    behind = shapes_of(found, "all-reduce", "reduce-scatter", in_loop=False)
    vectors = [shape for shape in behind if shape[:1] == (MODEL.layers,) and len(shape) == 2]
    matrices = [shape for shape in reduced if len(shape) > 1 and shape not in vectors]
    assert all(ADAPTERS & set(shape) and len(shape) == 2 for shape in matrices), matrices
    assert len(matrices) == (0 if method == "vera" else REDUCED)
    assert sorted(matrices) == sorted(
        shape
        for shape in shapes_of(found, "all-reduce", "reduce-scatter", in_loop=True)
        if len(shape) > 1
    )


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_kernels_are_gathered_inside_the_loop(platform: str, method: str) -> None:
    """One layer at a time, as they are stored; never the stack."""
    found = fsdp_collectives(platform, method)
    inside = shapes_of(found, "all-gather", in_loop=True)
    assert set(inside) >= KERNELS
    outside = shapes_of(found, "all-gather", in_loop=False)
    assert not KERNELS & set(outside)
    assert not any(MODEL.layers in shape for shape in inside + outside)
    if platform == "tpu":  # the CPU's compiler computes, and gathers, in float32
        types = {
            kind
            for one in found
            if one.kind == "all-gather" and one.in_loop
            for kind, shape in one.shapes
            if tuple(size for size in shape if size != 1) in KERNELS
        }
        assert types == {"bf16"}


COLUMNS = {columns for _, columns in KERNELS}
CODES = {(rows // 2, columns) for rows, columns in KERNELS}


@functools.cache
def quantized_program(platform: str, rows: int = 16) -> str:
    """The text of the step over fsdp = 16 (on the CPU 8) with an nf4 base; 16 rows are fewer than 4,096 tokens."""
    devices: Any = jax.devices() if platform == "cpu" else devices_of("v5e:4x4", "v5litepod-16")
    mesh = mesh_of(devices, fsdp=len(devices))
    settings = {"method.rank": RANK, "base.quantize": "nf4"}
    return compile_step(MODEL, mesh, "lora", rows=rows, length=192, **settings).as_text()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_of_a_quantized_base_codes_are_gathered_and_no_floats(platform: str) -> None:
    """In the loop over the layers, one layer at a time, a byte for two entries."""
    found = collectives_in(quantized_program(platform))
    gathered = {
        (kind, tuple(size for size in shape if size != 1), one.in_loop)
        for one in found
        if one.kind == "all-gather"
        for kind, shape in one.shapes
    }
    assert {shape for kind, shape, in_loop in gathered if kind == "u8" and in_loop} >= CODES
    for kind, shape, _ in gathered:
        assert MODEL.layers not in shape
        assert kind == "u8" or shape not in KERNELS | CODES


@pytest.mark.parametrize("platform", PLATFORMS)
def test_no_kernel_stands_dequantized_whole(platform: str) -> None:
    """Neither in float32 nor in any other float, of one layer or of all; half a kernel stands at a time at most."""
    bodies = standing_in(quantized_program(platform))
    floats = {shape for kind, shape in bodies if kind[0] in "bf" and kind != "f8"}
    assert not floats & (KERNELS - CODES)  # the half of o_proj is as large as k_proj
    assert not {
        shape for shape in floats if shape[:1] == (MODEL.layers,) and shape[1:] in KERNELS | CODES
    }
    if platform == "tpu":
        assert not {shape for kind, shape in bodies if kind == "f32" and shape in CODES}


@needs_tpu_compiler
def test_with_many_tokens_a_kernel_stands_dequantized_in_bfloat16_alone() -> None:
    """In the layer that it belongs to."""
    bodies = standing_in(quantized_program("tpu", rows=32))
    sizes = {math.prod(kernel) for kernel in KERNELS}
    floats = {(kind, shape) for kind, shape in bodies if kind in ("bf16", "f32")}
    of_kernels = {
        kind
        for kind, shape in floats
        if math.prod(shape) in sizes and shape[-1] in COLUMNS and 64 in shape
    }
    assert of_kernels == {"bf16"}
    stacks = {MODEL.layers * size for size in sizes}
    assert not {
        shape for _, shape in floats if shape[:1] == (MODEL.layers,) and math.prod(shape) in stacks
    }


DIVIDED = Config(
    family="llama", vocabulary=1024, hidden=512, intermediate=1280, layers=3, heads=8, key_heads=4,
    head_dim=128, max_length=512, dtype="bfloat16", remat="dots",
)  # fmt: skip
DIVIDED_KERNELS = {(512, 1024), (512, 512), (1024, 512), (512, 1280), (1280, 512)}
TENSOR, GROUP, LENGTH = 4, 64, 192
PLACES = (4, LENGTH)  # of activations on a device: rows, length


def is_of_activations(shape: tuple[int, ...]) -> bool:
    """Rows, length and features; those that come of codes may have units of features in front."""
    return PLACES in (shape[:2], shape[1:3])


@functools.cache
def divided_collectives(scheme: str) -> list[Collective]:
    """Those in the loop over the layers of the step over fsdp = 2 x tensor = 4."""
    mesh = mesh_of(devices_of("v5e:2x4", "v5litepod-8"), fsdp=2, tensor=TENSOR)
    settings = {"method.rank": RANK, "base.quantize": scheme}
    compiled = compile_step(DIVIDED, mesh, "lora", rows=8, length=LENGTH, **settings)
    return [one for one in collectives_in(compiled.as_text()) if one.in_loop]


def held_by_a_device(kernel: tuple[int, int], unit: int) -> tuple[int, int]:
    """The shape of a kernel's codes or scales as `tensor` divides them; unit: rows in a byte or a group."""
    rows, columns = kernel
    if kernel in {(1024, 512), (1280, 512)}:
        return (rows // TENSOR // unit, columns)
    return (rows // unit, columns // TENSOR)


@needs_tpu_compiler
@pytest.mark.parametrize(("scheme", "in_a_byte"), [("nf4", 2), ("int8", 1)])
def test_of_a_divided_quantized_base_codes_and_scales_are_gathered_over_fsdp_alone(
    scheme: str, in_a_byte: int
) -> None:
    """Each device's own part of a kernel; of floats adapters and activations alone, and nothing changes places."""
    found = divided_collectives(scheme)
    moved = shapes_of(found, "all-to-all", "collective-permute")
    # An adapter's gradient, or a flag.
    assert all(ADAPTERS & set(shape) for shape in moved if shape), moved
    codes = {held_by_a_device(kernel, in_a_byte) for kernel in DIVIDED_KERNELS}
    scales = {held_by_a_device(kernel, GROUP) for kernel in DIVIDED_KERNELS}
    gathered = {
        (kind, tuple(size for size in shape if size != 1))
        for one in found
        if one.kind == "all-gather"
        for kind, shape in one.shapes
    }
    bases = {
        (kind, (math.prod(shape[:-1]), shape[-1]))
        for kind, shape in gathered
        if not is_of_activations(shape) and not ADAPTERS & set(shape)
    }
    assert {shape for kind, shape in bases if kind in ("u8", "s8")} >= codes
    assert {shape for _, shape in bases} == codes | scales
    assert {shape for kind, shape in bases if kind not in ("u8", "s8")} <= scales


@needs_tpu_compiler
@pytest.mark.parametrize("scheme", ["none", "nf4"])
def test_on_a_divided_base_adapters_are_reduced_once_and_frozen_kernels_never(scheme: str) -> None:
    """Beside activations there are a and b of each projection, each as a device holds it."""
    reduced = shapes_of(divided_collectives(scheme), "all-reduce", "reduce-scatter")
    matrices = [shape for shape in reduced if len(shape) > 1 and not is_of_activations(shape)]
    assert all(ADAPTERS & set(shape) and len(shape) == 2 for shape in matrices), matrices
    assert len(matrices) == REDUCED


@needs_tpu_compiler
def test_activations_are_added_up_twice_in_each_pass_over_a_layer() -> None:
    """Forward what o_proj and down_proj give; backward the gradients to what q, k and v read, and gate and up."""
    shapes = shapes_of(divided_collectives("none"), "all-reduce", "reduce-scatter")
    whole = (*PLACES, DIVIDED.hidden)
    assert shapes.count(whole) == 4


@needs_tpu_compiler
@pytest.mark.parametrize(("kind", "more"), [("all-gather", 0), ("all-reduce", 3)])
def test_activations_are_exchanged_over_codes_as_over_floats(kind: str, more: int) -> None:
    """As many numbers in each pass over the layers; of codes alone, each kernel's gradient to its input by itself."""

    def exchanged(scheme: str) -> int:
        shapes = shapes_of(divided_collectives(scheme), kind)
        return sum(math.prod(shape) for shape in shapes if is_of_activations(shape))

    whole = math.prod(PLACES) * DIVIDED.hidden
    assert exchanged("nf4") - more * whole == exchanged("none") > 0


@needs_tpu_compiler
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_kernels_are_gathered_beside_other_work(method: str) -> None:
    """On v5e; of a dense base all but one, of which nothing stands before; of codes, whose products are loops, half."""
    found = fsdp_collectives("tpu", method)
    sizes = {rows * columns // (1 + (method == "qlora")) for rows, columns in KERNELS}
    kernels = [
        one for one in found
        if one.kind == "all-gather" and one.in_loop and math.prod(one.shapes[0][1]) in sizes
    ]  # fmt: skip
    assert len(kernels) == 2 * PROJECTIONS
    least = PROJECTIONS if method == "qlora" else 2 * PROJECTIONS - 1
    assert sum(one.overlapped for one in kernels) >= least


@needs_tpu_compiler
def test_v6e_computes_an_adapters_product_while_it_writes_the_bases() -> None:
    """Going forward those of q, k, v, o, gate and up; down's input is wide, and its two products stand alone."""
    mesh = mesh_of(devices_of("v6e:2x2", "v6e-4"), fsdp=4)
    model = dataclasses.replace(MODEL, remat="none")
    settings = {"method.rank": RANK, "remat": "none"}
    text = compile_step(model, mesh, "lora", rows=8, length=256, **settings).as_text()
    bodies = {name: "\n".join(lines) for name, lines in bodies_in(text).items()}
    products = {name: body for name, body in bodies.items() if " convolution(" in body}
    inside = [
        called
        for body in products.values()
        for called in re.findall(r" fusion\(.*calls=%?([\w.\-]+)", body)
        if called in products and "transpose(jvp())" not in body
    ]
    assert len(inside) == PROJECTIONS - 1


WIDTHS = {"8B": {}, "70B": {"hidden": 8192, "intermediate": 28672, "heads": 64}}


@pytest.mark.thorough  # minutes of compiling each
@needs_tpu_compiler
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_pod_of_256_gathers_what_is_stored_and_adds_up_adapters_alone(
    width: str, method: str
) -> None:
    """At Llama's widths, 2 layers. A sum bears its product's name; what is small may be gathered by sums too."""
    model = dataclasses.replace(LLAMA_8B, layers=2, **WIDTHS[width])
    mesh = mesh_of(devices_of("v5e:16x16", "v5litepod-256"), fsdp=256)
    settings = {"method.rank": RANK}
    text = compile_step(model, mesh, method, rows=512, length=2048, **settings).as_text()
    found = [one for one in collectives_in(text) if one.in_loop]
    sums = [one for one in found if one.kind != "all-gather" and "dot_general" in one.operation]
    shapes = shapes_of(sums, "all-reduce", "reduce-scatter")
    assert len(shapes) == REDUCED
    assert all(ADAPTERS & set(shape) and len(shape) == 2 for shape in shapes), shapes
    bases = {
        kind for one in found if one not in sums
        for kind, shape in one.shapes if math.prod(shape) >= model.hidden * 1024 // 4
    }  # fmt: skip
    assert bases <= ({"u8", "u32"} if method == "qlora" else {"bf16"})
    gathers = [
        one for one in found
        if one.kind == "all-gather" and math.prod(one.shapes[0][1]) >= model.hidden * 1024 // 4
    ]  # fmt: skip
    assert len(gathers) >= 2 * PROJECTIONS
    small = model.hidden * 1024 // 2 if method == "qlora" else 0  # codes of k and v
    wide = [one for one in gathers if math.prod(one.shapes[0][1]) > small]
    assert sum(one.overlapped for one in wide) >= len(wide) - 1 > 0
    assert sum(one.overlapped for one in gathers) >= len(gathers) - 1 - (method == "qlora")


def test_the_reader_finds_loops_and_shapes() -> None:
    """A gather in a computation that a loop's body calls is in the loop; one in the entry is not."""
    text = """
%fused (p: f32[2]) -> f32[16] {
  ROOT %all-gather.1 = bf16[16,4]{1,0} all-gather(%p), op_name="inner"
}
%body (p: f32[2]) -> f32[2] {
  %x = f32[16]{0} fusion(%p), kind=kCustom, calls=%fused
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %w = f32[2]{0} while(%p), condition=%c, body=%body
  %r = (f32[3]{0}, f32[]) all-reduce-start(%w, %w), op_name="outer"
}
%works (p: f32[2]) -> f32[16] {
  %all-gather.2 = bf16[8]{0} all-gather(%p), backend_config={"async_collective_fusion_config":{}}
}
%done (p: f32[2]) -> f32[16] {
  %all-gather.3 = bf16[8]{0} all-gather(%p), backend_config={"async_collective_fusion_config":{}}
  ROOT %c = bf16[8]{0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}
"""
    inner, outer, beside = collectives_in(text)
    assert (inner.overlapped, outer.overlapped, beside.overlapped) == (False, True, True)
    assert (inner.kind, inner.in_loop, inner.shapes) == ("all-gather", True, (("bf16", (16, 4)),))
    assert (outer.kind, outer.in_loop) == ("all-reduce", False)
    assert outer.shapes == (("f32", (3,)), ("f32", ()))


@pytest.mark.slow
@needs_tpu_compiler
def test_128k_tokens_of_an_8b_shape_fit_v5p() -> None:
    """LoRA on 64 chips, 8 rows of 131,072 tokens, each over 8 chips: below a chip's 95 GiB."""
    mesh = mesh_of(devices_of("v5p:4x4x4", "v5p-128"), fsdp=8, context=8)
    memory = compile_step(LLAMA_8B, mesh, "lora", rows=8, length=131072).memory_analysis()
    assert memory.peak_memory_in_bytes < 95 * 2**30
