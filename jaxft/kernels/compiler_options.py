"""The options of the compiler of TPUs."""

from __future__ import annotations

from jax.sharding import Mesh

# The compiler gives a fusion 16 MiB of a TPU core's fast memory by default (32 on v6e), with which the products of wide
# kernels reach half of their speed; these kinds have 64 and more. With 64 it looks for longer (a third of the time to
# compile), which pays on v6e (6 % of the estimated time of a step of 8B), and 96 do no more there.
WIDE, WIDEST = ({"xla_tpu_scoped_vmem_limit_kib": str(mebi * 2**10)} for mebi in (32, 64))
# A product whose result is at least so many MiB and goes with a collective is cut into windows, which follow each other
# round a ring: v5e sends activations that `tensor` divides so, while the products run. Gradients are added up whole:
# windows cost an adapter's more than their one sum, and around such loops the compiler gathers kernels while nothing
# else runs.
WINDOWS = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
BY_ACTIVATIONS, NEVER = "16", str(10**6)
# v5p's and v6e's SparseCores exchange while the products run, which are then best left whole; without 2d each kernel,
# which a slice's axes share among them, is gathered while nothing else runs. v5e has none: there the compiler lets
# products do it on the way.
SPARSECORES = {WINDOWS: NEVER} | {
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "true"
    for kind in ("all_gather", "2d_all_gather", "reduce_scatter", "all_reduce")
}
# Small kernels are gathered, not added up from copies padded with zeros. v6e's compiler can compute a narrow product
# that is added to a wide one while it writes that.
GATHERED = {"xla_tpu_prefer_async_allgather_to_allreduce": "true"}
ADDED = {"xla_tpu_enable_multi_level_output_dot_dot_fusion": "true"}
OPTIONS = {
    "TPU v5 lite": WIDE | GATHERED,
    "TPU v5": WIDE | GATHERED | SPARSECORES,
    "TPU v6 lite": WIDEST | GATHERED | SPARSECORES | ADDED,
}


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """The compiler's options, by the mesh and the kind of its devices."""
    options = OPTIONS.get(mesh.devices.flat[0].device_kind)
    if options is None:
        return {}
    return {WINDOWS: BY_ACTIVATIONS if mesh.shape["tensor"] > 1 else NEVER} | options
