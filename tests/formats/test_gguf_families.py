"""GGUF files of the newer families: written as llama.cpp's converter writes them, and read as the folder they are of.

gguf_families.json holds what the converter wrote, and how far llama.cpp's own logits for it lie from transformers'.
"""

from __future__ import annotations

import functools
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from jaxft.errors import UserError
from jaxft.formats.config_file import model_config
from jaxft.formats.gguf.architectures import ARCHITECTURES, config_of
from jaxft.formats.gguf.header import Header, read_header
from jaxft.formats.gguf.reading import import_gguf
from jaxft.formats.gguf.settings import SAID_ELSEWHERE
from jaxft.formats.gguf.writing import export_gguf
from jaxft.formats.safetensors import open_folder
from jaxft.models.families import family_of

GOLDEN = Path(__file__).parent.parent / "golden"
sys.path.insert(0, str(GOLDEN))
from family_folders import GGUF, write_folder, write_tokenizer  # noqa: E402

# Keys of the converter's that change nothing: no scaling, and another norm's epsilon.
EMPTY = (
    "cohere2.rope.scaling.type",
    "nemotron.rope.scaling.type",
    "nemotron.attention.layer_norm_rms_epsilon",
)
CASES = json.loads(GGUF.read_text())


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """`folder = folder_of("phi3")`: a case's folder with a tokenizer, written once."""

    @functools.cache
    def make(name: str) -> Path:
        folder = write_folder(CASES[name], tmp_path_factory.mktemp("folders") / name)
        write_tokenizer(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def file_of(folder_of, tmp_path_factory):
    """`file = file_of("phi3")`: that folder's file in float32, written once."""
    made = tmp_path_factory.mktemp("files")
    return functools.cache(
        lambda name: export_gguf(folder_of(name), made / f"{name}.gguf", kind="f32")
    )


def shape_of(config) -> dict:
    """What a `Config` says of the decoder."""
    return {key: value for key, value in vars(config).items() if key not in SAID_ELSEWHERE}


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_says_of_the_converters_file_what_transformers_says_of_the_folder(name):
    """Up to its table of gelu, which has 16 bits: so a file with these keys and tensors means that model."""
    gelu = "gelu" in str(CASES[name]["config"])
    deviation = CASES[name]["llama"]
    assert (deviation is None) == (name == "exaone4_window")
    assert deviation is None or deviation < (4e-3 if gelu else 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_what_llama_cpps_converter_writes(name, file_of):
    """Each tensor byte for byte, and each key of the converter's with its value."""
    ours, theirs = read_header(file_of(name)), CASES[name]
    written = {
        key: [zlib.crc32(np.ascontiguousarray(one.read()).tobytes()), *one.shape]
        for key, one in ours.tensors.items()
    }
    assert written == theirs["written"]
    different = {
        key: (ours.metadata.get(key), value)
        for key, value in theirs["metadata"].items()
        if ours.metadata.get(key) != value and key not in EMPTY
    }
    if name == "phi3":  # the length before a scaling that there is not
        del different["phi3.rope.scaling.original_context_length"]
    assert not different


@pytest.mark.parametrize("name", CASES)
def test_the_converters_keys_are_read_as_the_folders_config(name, folder_of, file_of):
    """Of its keys alone, without those that jaxft adds."""
    ours = read_header(file_of(name))
    architecture = {"general.architecture": ours.metadata["general.architecture"]}
    header = Header(file_of(name), architecture | CASES[name]["metadata"], ours.tensors)
    raw = config_of(header)
    read = family_of(raw["model_type"], "config.json").read(raw)
    assert shape_of(read) == shape_of(model_config(folder_of(name)))


@pytest.mark.parametrize("name", CASES)
def test_an_imported_file_is_the_folder_again(name, folder_of, file_of, tmp_path):
    """Bit for bit, but for the norms of which the file holds one more."""
    back = open_folder(import_gguf(file_of(name), tmp_path / "back"))
    stored = open_folder(folder_of(name))
    offset = ARCHITECTURES[read_header(file_of(name)).metadata["general.architecture"]].offset
    assert back.keys() == stored.keys()
    for key, one in stored.items():
        near = 1e-6 if offset and key.endswith("norm.weight") else 0.0
        np.testing.assert_allclose(back[key].read(), one.read(), rtol=0, atol=near, err_msg=key)


def refused(file: Path, changes: dict, folder: Path, lacking: tuple[str, ...] = ()) -> str:
    """What `config_of` says of a file with other keys."""
    header = read_header(file)
    tensors = {key: one for key, one in header.tensors.items() if key not in lacking}
    with pytest.raises(UserError) as error:
        config_of(Header(file, {**header.metadata, **changes}, tensors))
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("glm4", {"glm4.rope.dimension_sections": [8, 4]}, "glm4.rope.dimension_sections is not"),
        ("glm4", {"glm4.nextn_predict_layers": 1}, "glm4.nextn_predict_layers is not known"),
        ("olmo3", {"olmo2.attention.sliding_window_pattern": [True]}, "1 entries for 4 layers"),
        ("olmo3", {"olmo2.block_count": 10**9}, "is no number for layers"),
        ("phi3", {"phi3.rope.dimension_count": 99}, "99 of a head's 6 features cannot turn"),
        ("ministral3", {"mistral3.expert_count": 8}, "mistral3.expert_count is not known"),
        ("ministral3", {"mistral3.rope.scaling.type": "none"}, "is not yarn"),
        ("qwen3", {"general.architecture": "qwen3moe"}, "'qwen3moe' is not read from GGUF (nearest: 'qwen3'"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_by_name(name, changes, said, file_of, tmp_path):
    assert said in refused(file_of(name), changes, tmp_path)


def test_norms_of_each_head_are_refused(folder_of, tmp_path):
    """stablelm's 12B, which the converter cannot write either."""
    other = json.loads((GOLDEN / "families.json").read_text())["stablelm_parallel"]
    folder = write_folder(other, tmp_path / "model")
    write_tokenizer(folder)
    with pytest.raises(UserError, match=r"no name for model\.layers\.0\.self_attn\.q_layernorm"):
        export_gguf(folder, tmp_path / "a.gguf")


def test_mistral_small_stands_under_ministrals_name(file_of):
    """Its queries do not grow, and nothing is scaled."""
    header = read_header(file_of("ministral3"))
    plain = {
        key: value
        for key, value in header.metadata.items()
        if "rope.scaling" not in key and "temperature" not in key
    }
    raw = config_of(Header(header.file, plain, header.tensors))
    assert (raw["model_type"], raw["sliding_window"]) == ("mistral", None)
    assert "rope_parameters" not in raw
