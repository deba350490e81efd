"""Folders that GPTQ's, AWQ's and compressed-tensors' libraries quantized: read as they are, or refused in one line."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.errors import UserError
from jaxft.formats import compressed_tensors, load
from jaxft.formats.integers import pack_halves, unpack
from jaxft.formats.safetensors import open_folder
from jaxft.quantizing import quantization_of
from jaxft.weights import Permuted, Quantized, is_weight, quantized_in, weights_of

FOLDERS = {
    "gptq": ("int4", True, False),
    "gptq_act_order": ("int4", False, True),
    "gptq_8bit": ("int8", False, False),
    "gptq_8bit_act_order": ("int8", True, True),
    "awq": ("int4", True, False),
    "packed_4bit": ("int4", True, False),
    "packed_4bit_channel": ("int4", False, False),
    "packed_8bit": ("int8", True, False),
    "packed_indexed": ("int4", False, True),
    "int_quantized": ("int8", False, False),
}
MODULES = {"q_proj": "self_attn.q_proj", "o_proj": "self_attn.o_proj"}
MODULES |= {name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}


@pytest.fixture(params=FOLDERS)
def name(request):
    return request.param


def test_the_logits_are_those_of_the_dequantized_model(golden, name, logits_of, deviation, capsys):
    folder = golden / "packed" / name
    expected = np.load(folder / "expected.npz")
    model, params = load(folder)
    logits = logits_of(model, params, expected["input_ids"])
    assert deviation(logits, expected["logits"]) < 1e-5
    assert ("input_activations" in capsys.readouterr().err) == (name == "int_quantized")


def test_the_weights_are_the_codes_and_equal_the_dequantized_ones(golden, name):
    folder = golden / "packed" / name
    expected = np.load(folder / "expected.npz")
    scheme, offset, scattered = FOLDERS[name]
    _, params = load(folder)
    kernels = {path.split("/")[-2]: weight for path, weight in weights_of(params["layers"])}
    assert len(kernels) == 7
    for kernel, module in MODULES.items():
        weight = kernels[kernel]
        assert isinstance(weight, Permuted if scattered else Quantized)
        assert (weight.scheme, weight.zeros is not None) == (scheme, offset)
        dense = np.asarray(jaxft.materialize(weight))[1].T
        np.testing.assert_array_equal(dense, expected[f"dense.{module}"])


@pytest.mark.parametrize("name", ["gptq_act_order", "int_quantized"])
def test_an_adapter_trains_over_them_and_merges_into_a_dense_folder(golden, name, tmp_path):
    from jaxft.formats.merge import merge_folder

    folder = golden / "packed" / name
    _, params = load(folder)
    method = jaxft.methods.lora(rank=2, targets=("q_proj", "down_proj"))
    params = jaxft.adapt(params, method, jax.random.key(0))
    trainable, _ = jaxft.partition(params, method)
    assert len(jax.tree.leaves(trainable)) == 4
    moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.1 if path[-1] == jax.tree_util.GetAttrKey("b") else leaf, params
    )
    jaxft.save_adapter(moved, tmp_path / "adapter", base=folder)
    assert "quantized: int" in (tmp_path / "adapter/README.md").read_text()
    assert merge_folder(folder, tmp_path / "adapter", tmp_path / "merged") < 2e-3  # float16 scales
    assert not quantized_in(load(tmp_path / "merged")[1])


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("kind", ["symmetric", "offset"])
def test_activation_order_is_read_as_compressed_tensors_itself_packs_it(golden, scheme, kind):
    """The values are those that the library dequantizes, and the rows of its groups are scattered."""
    name = f"{scheme.removeprefix('int')}bit_{kind}"
    expected = np.load(golden / "indexed/expected.npz")[name]
    stored = open_folder(golden / "indexed")
    names = [f"{name}.weight"]
    [weight] = compressed_tensors.read_layers({}, stored, names, expected.T.shape, np.float32)
    assert isinstance(weight, Permuted)
    assert weight.scheme == scheme
    assert (weight.zeros is not None) == (kind == "offset")
    np.testing.assert_array_equal(np.asarray(jaxft.materialize(weight)).T, expected)


def test_unpacking_is_the_inverse_of_packing():
    codes = np.random.default_rng(0).integers(0, 16, (6, 16)).astype(np.uint8)
    words = np.sum(codes.reshape(6, 2, 8).astype(np.int64) << (4 * np.arange(8)), axis=-1)
    np.testing.assert_array_equal(unpack(words.astype(np.uint32).view(np.int32), 4), codes)
    halves = pack_halves(codes)
    np.testing.assert_array_equal(np.concatenate([halves & 15, halves >> 4]), codes)


@pytest.fixture
def spoiled(copy_of, edit):
    """`folder = spoiled("gptq", {tensor: change}, setting=value)`: a golden folder made wrong."""

    def spoil(name: str, tensors=None, **settings):
        folder = copy_of(f"packed/{name}")
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        edit(folder / "config.json", quantization_config=config | settings)
        if tensors:
            stored = load_file(folder / "model.safetensors")
            for tensor, change in tensors.items():
                changed = change(stored.get(tensor))
                stored.pop(tensor, None)
                if changed is not None:
                    stored[tensor] = np.ascontiguousarray(changed)
            save_file(stored, folder / "model.safetensors", {"format": "pt"})
        return folder

    return spoil


def group(**weights):
    return {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"} | weights}}}


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("gptq", {"quant_method": "fp8"}, "'fp8' is not known to jaxft, which reads bitsandbytes"),
        ("gptq", {"checkpoint_format": "marlin"}, "format 'marlin' is not known to jaxft.*gptq_v2"),
        ("gptq", {"bits": 3}, "GPTQ of 3 bits: jaxft reads 4 and 8"),
        ("gptq", {"group_size": 5}, "config.json says groups of 5, which 2 are not for 32 rows"),
        ("awq", {"version": "gemv"}, "layout 'gemv' is not known to jaxft, which reads gemm"),
        ("awq", {"bits": 8}, "AWQ of 8 bits: jaxft reads 4"),
        ("awq", {"zero_point": False}, "AWQ without zero points"),
        ("packed_4bit", {"format": "marlin-24"}, "'marlin-24': jaxft reads integers of 4 and 8"),
        ("packed_4bit", {"format": "float-quantized"}, "'float-quantized': jaxft reads integers"),
        ("packed_4bit", group(type="float"), "weights.type = 'float' .*jaxft reads integers"),
        ("packed_4bit", group(num_bits=3), "weights.num_bits = 3"),
        ("packed_4bit", group(strategy="block"), "weights.strategy = 'block'"),
        ("packed_4bit", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "with sparsity"),
        ("packed_4bit", {"transform_config": {"a": 1}}, "with a transform_config"),
        ("packed_4bit", {"config_groups": None}, "without config_groups"),
    ],
)
def test_a_variant_that_is_not_read_is_refused(spoiled, name, settings, said):
    with pytest.raises(UserError, match=said):
        load(spoiled(name, **settings))


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "change", "said"),
    [
        ("gptq", f"{Q}.qweight", lambda x: x[:-1], r"is I32 \[3, 64\]; I32 \[4, 64\] is expected"),
        ("gptq", f"{Q}.scales", lambda x: x[:, :-1], r"\[2, 63\]; .* \[2, 64\] is expected"),
        ("gptq", f"{Q}.qzeros", lambda x: None, "q_proj.qzeros is missing"),
        ("gptq", f"{Q}.g_idx", lambda x: x * 0, "does not put 32 rows into 2 groups of one size"),
        ("gptq", f"{Q}.g_idx", lambda x: x - 1, "does not put 32 rows into 2 groups of one size"),
        ("gptq", f"{Q}.bias", lambda x: np.ones(64, np.float16), "q_proj.bias is not used"),
        ("gptq", f"{Q}.odd", lambda x: np.ones(1, np.float16), "q_proj.odd is not used"),
        ("gptq", f"{Q}.weight", lambda x: np.ones((64, 32), np.float32), "q_proj.weight is not"),
        ("gptq", f"{Q}.qweight", lambda x: None, "the tensor .*q_proj.weight is missing"),
        ("awq", f"{Q}.qweight", lambda x: x.T, r"is I32 \[8, 32\]; I32 \[32, 8\]"),
        ("awq", f"{Q}.scales", lambda x: x[:0], "do not divide the 32 rows"),
        ("packed_4bit", f"{Q}.weight_scale", lambda x: x[:, [0, 1, 1]], "do not divide the 32"),
        ("packed_4bit", f"{Q}.weight_shape", lambda x: x + 1, r"is \[65, 33\], the model needs"),
        ("packed_4bit", f"{Q}.weight_packed", lambda x: x[:-1], r"\[63, 4\]; I32 \[64, 4\]"),
        ("packed_4bit", f"{Q}.weight_zero_point", lambda x: x[:-1], r"\[7, 2\]; I32 \[8, 2\]"),
        ("int_quantized", f"{Q}.weight_scale", lambda x: None, "q_proj.weight is I8; jaxft reads"),
        ("int_quantized", f"{Q}.weight", lambda x: x[:-1], r"I8 \[63, 32\]; I8 \[64, 32\]"),
    ],
)
def test_a_tensor_missing_too_many_or_of_another_shape_is_refused(
    spoiled, name, tensor, change, said
):
    with pytest.raises(UserError, match=said):
        load(spoiled(name, {tensor: change}))


def test_layers_in_groups_of_their_own_are_not_stacked(spoiled):
    halved = {f"{Q}.{part}": lambda x: x[:1] for part in ("scales", "qzeros")}
    halved[f"{Q}.g_idx"] = lambda x: x * 0
    with pytest.raises(UserError, match="its layers are quantized in different ways"):
        load(spoiled("gptq", halved, dynamic={"+:.*layers.1.*": {"group_size": -1}}))


@pytest.mark.parametrize("name", ["gptq", "awq", "packed_4bit"])
def test_none_of_them_is_quantized_again(golden, name):
    with pytest.raises(UserError, match="is quantized already"):
        load(golden / "packed" / name, quantize="nf4")


def test_full_tuning_over_codes_is_refused(golden):
    _, params = load(golden / "packed/gptq")
    with pytest.raises(UserError, match=r"is quantized \(int4\) and cannot train"):
        jaxft.partition(params, jaxft.methods.full())
    assert all(is_weight(leaf) for _, leaf in quantized_in(params))


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
@pytest.mark.parametrize("name", ["gptq_act_order", "packed_4bit"])
def test_over_a_mesh_the_logits_are_the_same(golden, name, axis, deviation):
    """Codes lie as their kernels do, and the order of the rows on every device; the base is known by its digest."""
    from ml_collections import ConfigDict

    from jaxft.training.sharding import leaf_sharding, make_mesh

    folder = golden / "packed" / name
    expected = np.load(folder / "expected.npz")
    sizes = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | {axis: 2}
    mesh = make_mesh(ConfigDict(sizes), jax.devices()[:2])
    model, params = load(folder, shardings=lambda path, shape: leaf_sharding(mesh, path, shape))
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    codes = getattr(kernel, "ordered", kernel).codes
    assert codes.addressable_shards[0].data.size * 2 == codes.size
    kernel = params["layers"]["mlp"]["down_proj"]["kernel"]
    assert getattr(kernel, "ordered", kernel).parts == (2 if axis == "tensor" else 1)
    assert quantization_of(params) == quantization_of(load(folder)[1])
    with jax.set_mesh(mesh):
        logits = jax.jit(lambda params, ids: model.apply({"params": params}, ids))(
            params, expected["input_ids"]
        )
    assert deviation(np.asarray(logits), expected["logits"]) < 1e-5
