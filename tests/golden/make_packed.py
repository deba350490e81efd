"""Folders quantized as GPTQ's, AWQ's and compressed-tensors' libraries do, and what they compute: packed/<name>/.

Each folder holds config.json, the weights with every projection of the layers quantized, and expected.npz:

    input_ids (batch, length), logits (batch, length, vocabulary)    of the dequantized model, float32
    dense.NAME                                                       one layer's dequantized weights (out, in)

The packers below are written from the libraries' formats and are their only user. Where gptqmodel, optimum and
compressed-tensors are installed, `--check` asks transformers for the logits of the folders of the first two, and the
third for its weights (its present version has no g_idx any more: `make_indexed.py` asks an older one).

    python tests/golden/make_packed.py [--check]
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_models import BASE_ROPE, randomise
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils.logging import disable_progress_bar

FOLDER = Path(__file__).parent / "packed"
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns in a word, from the lowest bits
Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Codes:
    """A weight (out, in) in codes: entry = (code - zero) scale, with the row of scales that `group` says.

    Attributes:
        codes: (out, in), from 0.
        scales: (out, groups), which float16 holds.
        zeros: (out, groups).
        group: (in,).
        bits: of a code.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    group: np.ndarray
    bits: int

    def dense(self) -> np.ndarray:
        """(out, in) float32."""
        offset = self.codes.astype(np.float32) - self.zeros[:, self.group].astype(np.float32)
        return offset * self.scales[:, self.group].astype(np.float32)


def to_codes(
    weight: np.ndarray, bits: int, size: int, symmetric: bool, seed: int, scattered: bool
) -> Codes:
    """The weight rounded to the nearest codes; `scattered` draws which inputs make a group."""
    inputs, high = weight.shape[1], 2**bits - 1
    size = inputs if size == -1 else size
    group = np.arange(inputs) // size
    if scattered:
        group = group[np.random.default_rng(seed).permutation(inputs)]
    scales = np.empty((len(weight), inputs // size), np.float16)
    zeros = np.empty(scales.shape, np.int64)
    for number in range(inputs // size):
        part = weight[:, group == number]
        low, top = part.min(1).clip(max=0), part.max(1).clip(min=0)
        span = 2 * np.maximum(-low, top) if symmetric else top - low
        scales[:, number] = span / high
        middle = np.full(len(weight), (high + 1) // 2)
        zeros[:, number] = middle if symmetric else np.round(-low / scales[:, number]).clip(1, high)
    codes = np.round(weight / scales[:, group]) + zeros[:, group]
    return Codes(codes.clip(0, high).astype(np.int64), scales, zeros, group, bits)


def words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """(rows, columns) packed along the columns into int32, the first column in the lowest bits."""
    each = 32 // bits
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each)))
    parts = codes.reshape(len(codes), -1, each).astype(np.uint64)
    packed = (parts << (np.arange(each, dtype=np.uint64) * bits)).sum(-1)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def gptq(less: int) -> Callable[[str, Codes], Tensors]:
    """GPTQ's tensors; `less` is what the format takes off the zeros."""

    def make(name: str, one: Codes) -> Tensors:
        return {
            f"{name}.qweight": words(one.codes, one.bits).T,
            f"{name}.qzeros": words(one.zeros.T - less, one.bits),
            f"{name}.scales": torch.from_numpy(one.scales.T.copy()),
            f"{name}.g_idx": torch.from_numpy(one.group.astype(np.int32)),
        }

    return make


def gptq_biased(name: str, one: Codes) -> Tensors:
    """The same with a bias of zeros, which the model does not have."""
    return gptq(1)(name, one) | {f"{name}.bias": torch.zeros(len(one.codes), dtype=torch.float16)}


def awq(name: str, one: Codes) -> Tensors:
    def interleaved(codes: np.ndarray) -> torch.Tensor:
        rows = codes.reshape(len(codes), -1, 8)[..., AWQ_PLACES]
        return words(rows.reshape(len(codes), -1), 4)

    return {
        f"{name}.qweight": interleaved(one.codes.T),
        f"{name}.qzeros": interleaved(one.zeros.T),
        f"{name}.scales": torch.from_numpy(one.scales.T.copy()),
    }


def packed(offset: bool, indexed: bool = False) -> Callable[[str, Codes], Tensors]:
    """compressed-tensors' pack-quantized."""

    def make(name: str, one: Codes) -> Tensors:
        made = {
            f"{name}.weight_packed": words(one.codes, one.bits),
            f"{name}.weight_scale": torch.from_numpy(one.scales),
            f"{name}.weight_shape": torch.tensor(one.codes.shape),
        }
        if offset:
            made[f"{name}.weight_zero_point"] = words(one.zeros.T, one.bits).T
        if indexed:
            made[f"{name}.weight_g_idx"] = torch.from_numpy(one.group.astype(np.int32))
        return made

    return make


def plain(name: str, one: Codes) -> Tensors:
    """compressed-tensors' int-quantized."""
    return {
        f"{name}.weight": torch.from_numpy((one.codes - 128).astype(np.int8)),
        f"{name}.weight_scale": torch.from_numpy(one.scales),
    }


def compressed(form: str, bits: int, size: int, symmetric: bool, **more: Any) -> dict[str, Any]:
    """compressed-tensors' quantization_config."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if size == -1 else "group",
        "group_size": None if size == -1 else size,
        "dynamic": False,
        "observer": "minmax",
    }
    group = {"targets": ["Linear"], "weights": weights | more.pop("weights", {}), **more}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@dataclasses.dataclass(frozen=True)
class Variant:
    """A folder to write: how its codes are made, stored and told of."""

    bits: int
    size: int
    symmetric: bool
    store: Callable[[str, Codes], Tensors]
    told: dict[str, Any]
    scattered: bool = False
    loads: bool = True  # in the present versions of the libraries


def variants() -> dict[str, Variant]:
    common = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
    v2 = {"checkpoint_format": "gptq_v2"}
    dynamic = {"input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}}  # fmt: skip
    told = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True}
    return {
        "gptq": Variant(4, 16, False, gptq(1), common),
        "gptq_act_order": Variant(
            4, 16, True, gptq(0), common | v2 | {"desc_act": True, "sym": True}, True
        ),
        "gptq_8bit": Variant(
            8, -1, True, gptq_biased, common | {"bits": 8, "group_size": -1, "sym": True}
        ),
        "gptq_8bit_act_order": Variant(
            8, 16, False, gptq(0), common | v2 | {"bits": 8, "desc_act": True}, True
        ),
        "awq": Variant(4, 16, False, awq, told | {"version": "gemm"}),
        "packed_4bit": Variant(
            4, 16, False, packed(True), compressed("pack-quantized", 4, 16, False)
        ),
        "packed_4bit_channel": Variant(
            4, -1, True, packed(False), compressed("pack-quantized", 4, -1, True)
        ),
        "packed_8bit": Variant(
            8, 16, False, packed(True), compressed("pack-quantized", 8, 16, False)
        ),
        "packed_indexed": Variant(
            4,
            16,
            True,
            packed(False, True),
            compressed("pack-quantized", 4, 16, True, weights={"actorder": "group"}),
            True,
            loads=False,
        ),
        "int_quantized": Variant(
            8, -1, True, plain, compressed("int-quantized", 8, -1, True, **dynamic)
        ),
    }


def base() -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=32,
        rope_parameters=BASE_ROPE,
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, seed=5)
    return model


@torch.no_grad()
def write(name: str, variant: Variant) -> None:
    folder, model = FOLDER / name, base()
    folder.mkdir(parents=True)
    tensors: Tensors = {}
    expected: dict[str, np.ndarray] = {}
    for seed, (module, linear) in enumerate(model.model.layers.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            codes = to_codes(
                linear.weight.numpy(),
                variant.bits,
                variant.size,
                variant.symmetric,
                seed,
                variant.scattered,
            )
            linear.weight.copy_(torch.from_numpy(codes.dense()))
            tensors |= variant.store(f"model.layers.{module}", codes)
            if module.startswith("1."):
                expected[f"dense.{module.removeprefix('1.')}"] = codes.dense()
    whole = {key: value for key, value in model.state_dict().items() if "_proj" not in key}
    save_file(
        {key: value.contiguous() for key, value in (whole | tensors).items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = model.config.to_dict() | {"quantization_config": variant.told}
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n")
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 48, (2, 12)))
    expected |= {"input_ids": ids.numpy().astype(np.int32), "logits": model(ids).logits.numpy()}
    np.savez_compressed(folder / "expected.npz", **expected)


def in_transformers(name: str) -> float:
    """The deviation of the folder's logits in transformers, whose kernels compute in half precision."""
    here = FOLDER / name
    script = Path(__file__).with_name("check_written.py")
    words = [sys.executable, script, "--model", here, here / "expected.npz"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    found = re.search(r"largest deviation (\S+)", done.stdout)
    return float(found[1]) if found else float("inf")


def in_compressed_tensors(name: str, told: dict[str, Any]) -> float:
    """The deviation of the weights that the library itself decompresses."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(**told["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(told["format"])
    stored = load_file(FOLDER / name / "model.safetensors")
    expected = np.load(FOLDER / name / "expected.npz")
    worst = 0.0
    for key in expected.files:
        if key.startswith("dense."):
            module = f"model.layers.1.{key.removeprefix('dense.')}."
            parts = {k.removeprefix(module): v for k, v in stored.items() if k.startswith(module)}
            parts["weight_scale"] = parts["weight_scale"].float()
            found = compressor.decompress(parts, scheme)["weight"].numpy()
            worst = max(worst, float(np.abs(found - expected[key]).max()))
    return worst


def check() -> int:
    """Asks the libraries about what their present versions read: how many folders failed."""
    failed = 0
    for name, variant in variants().items():
        if not variant.loads:
            continue
        library = variant.told["quant_method"] == "compressed-tensors"
        found = in_compressed_tensors(name, variant.told) if library else in_transformers(name)
        print(f"{name}: {found:.1e}")
        failed += not found < (1e-6 if library else 5e-3)
    return failed


def main() -> None:
    disable_progress_bar()
    if sys.argv[1:] == ["--check"]:
        sys.exit(check())
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name, variant in variants().items():
        write(name, variant)
        size = sum(file.stat().st_size for file in (FOLDER / name).iterdir())
        print(f"{name}: {size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
