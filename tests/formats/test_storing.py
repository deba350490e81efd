"""jaxft.formats.storing: an adapter written again with fewer bytes."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.formats import load_adapter
from jaxft.formats.adapter_file import NARROW, open_adapter
from jaxft.formats.combining import merge_adapters
from jaxft.formats.manifest import check_manifest
from jaxft.formats.safetensors import Lazy, open_file, write_file
from jaxft.formats.storing import store_folder


def logits_with(golden, model_of, logits_of, adapter, base="llama"):
    model, params = model_of(base)
    ids = np.arange(8, dtype=np.int32)[None] + 3
    return logits_of(model, load_adapter(params, adapter), ids)


@pytest.mark.parametrize("adapter", ["lora", "dora", "vera"])
@pytest.mark.parametrize(
    ("dtype", "size", "most"), [("bfloat16", 2, 3e-3), ("float16", 2, 4e-4), ("int8", 1, 1e-2)]
)
def test_an_adapter_of_any_kind_takes_fewer_bytes_and_says_nearly_the_same(
    golden, model_of, logits_of, deviation, tmp_path, adapter, dtype, size, most
):
    source = golden / "adapters" / adapter
    moved = store_folder(source, tmp_path / "out", dtype)
    assert (moved < most) if (adapter, dtype) == ("vera", "int8") else (most / 20 < moved < most)
    assert check_manifest(tmp_path / "out", required=True)
    before, after = open_adapter(source), open_adapter(tmp_path / "out")
    if adapter == "lora":
        file = next((tmp_path / "out").glob("*.safetensors"))
        narrow = [one for one in open_file(file).values() if not one.name.endswith(".scale")]
        assert {one.numpy.itemsize for one in narrow} == {size}
        assert before.keys() == after.keys()
    wanted, found = (
        logits_with(golden, model_of, logits_of, f) for f in (source, tmp_path / "out")
    )
    assert deviation(found, wanted) < 10 * most


def test_int8_has_a_scale_for_each_rank(golden, tmp_path):
    store_folder(golden / "adapters/lora", tmp_path / "out", "int8")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    own, again = open_adapter(golden / "adapters/lora"), open_adapter(tmp_path / "out")
    for part, axis in (("A", 1), ("B", 0)):
        wanted, found = (tensors[name.format(part)].read() for tensors in (own, again))
        steps = np.abs(wanted).max(axis, keepdims=True) / 127
        assert (np.abs(found - wanted) <= 0.51 * steps).all()
    assert not (
        tmp_path / "out/adapter_model.safetensors"
    ).exists()  # which PEFT would take for weights


def test_projections_that_the_seed_draws_are_left_out(
    golden, model_of, logits_of, deviation, tmp_path, capsys
):
    source = golden / "adapters/vera"
    store_folder(source, tmp_path / "out")
    assert "without the projections, which its seed draws" in capsys.readouterr().out
    assert not any("vera_A" in name for name in open_adapter(tmp_path / "out"))
    assert (
        json.loads((tmp_path / "out/adapter_config.json").read_text())["save_projection"] is False
    )
    wanted, found = (
        logits_with(golden, model_of, logits_of, f) for f in (source, tmp_path / "out")
    )
    assert deviation(found, wanted) < 1e-5
    shutil.copytree(source, tmp_path / "other")
    config = json.loads((source / "adapter_config.json").read_text()) | {"projection_prng_key": 8}
    (tmp_path / "other/adapter_config.json").write_text(json.dumps(config))
    store_folder(tmp_path / "other", tmp_path / "kept")
    assert any("vera_A" in name for name in open_adapter(tmp_path / "kept"))


def test_projections_of_another_seed_are_written_down_and_left_out(model_of, tmp_path):
    base = model_of("llama")[1]
    method = jaxft.methods.vera(rank=4, targets=("q_proj",), projection_seed=8)
    tree = jaxft.adapt(base, method, jax.random.key(0))
    for turn in ("first", "again"):
        jaxft.save_adapter(tree, tmp_path / turn)
        config = json.loads((tmp_path / turn / "adapter_config.json").read_text())
        assert config["projection_prng_key"] == 8
        store_folder(tmp_path / turn, tmp_path / turn / "small")
        assert not any("vera_A" in name for name in open_adapter(tmp_path / turn / "small"))
        tree = load_adapter(base, tmp_path / turn / "small")


def test_what_stands_beside_the_tensors_comes_along(golden, tmp_path):
    shutil.copytree(golden / "adapters/lora", tmp_path / "source")
    (tmp_path / "source/chat_template.jinja").write_text("{{ messages }}")
    store_folder(tmp_path / "source", tmp_path / "out", "int8")
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"


def test_a_damaged_file_of_codes_is_told(golden, tmp_path):
    store_folder(golden / "adapters/lora", tmp_path / "out", "int8")
    file = tmp_path / "out" / NARROW
    gone = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight.scale"
    left = {name: np.array(one.read()) for name, one in open_file(file).items() if name != gone}
    write_file(file, {name: Lazy(x.shape, x.dtype, x.copy) for name, x in left.items()})
    with pytest.raises(
        UserError, match=r"q_proj.lora_A.weight.scale is missing, without which codes are nothing"
    ):
        open_adapter(tmp_path / "out")


def test_int8_is_of_one_adapter_alone(golden, tmp_path):
    adapters = [golden / "adapters" / name for name in ("head", "rslora")]
    for given, options in (
        (adapters, {"weights": [1, 1]}),
        (adapters[:1], {"model": golden / "models/llama"}),
    ):
        with pytest.raises(UserError, match="--dtype int8 stores one adapter as it is"):
            merge_adapters(given, tmp_path / "out", dtype="int8", **options)
