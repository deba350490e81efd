"""Numbers in messages go with their nouns."""

import re
import types

import jax
import pytest

from jaxft.configuration import load_config
from jaxft.errors import UserError, counted, worded
from jaxft.training.sharding import lengths_on, make_mesh, require_rows
from jaxft.tree import require_matches


def test_a_number_goes_with_its_noun():
    assert [counted(n, "row") for n in (0, 1, 2, 1024)] == [
        "0 rows",
        "1 row",
        "2 rows",
        "1,024 rows",
    ]
    assert counted(2, "entry", "entries") == "2 entries"
    assert [worded(n, "is", "are") for n in (0, 1, 2)] == ["are", "is", "are"]


FOUR = types.SimpleNamespace(shape={"data": 2, "fsdp": 2, "context": 2, "tensor": 1})


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (1, "1 row does not divide among data x fsdp = 4 devices; 4 does"),
        (6, "6 rows do not divide among data x fsdp = 4 devices; 4 or 8 do"),
    ],
)
def test_rows_that_do_not_divide_name_those_that_do_once(rows, says):
    with pytest.raises(UserError, match=re.escape(f"config.batch_size: {says}")):
        require_rows(rows, FOUR, "batch_size")


def test_lengths_that_do_not_divide_name_those_that_do_once():
    with pytest.raises(UserError, match=r"chunks; 4 does$"):
        lengths_on([3], FOUR)
    with pytest.raises(UserError, match=r"chunks; 4 or 8 does$"):
        lengths_on([6], FOUR)


def test_one_device_is_one():
    sizes = load_config("configs/sft.py:lora", {"mesh.data": 2}).mesh
    with pytest.raises(UserError, match=r"does not fit 1 device$"):
        make_mesh(sizes, jax.devices()[:1])


def test_a_pattern_by_hugging_faces_name_is_told_ours():
    paths = ["embed/embedding", "head/kernel", "layers/mlp_norm/scale"]
    for theirs, ours in (("lm_head", "head"), ("model.embed_tokens", "embed")):
        with pytest.raises(UserError, match=f"matches nothing; here it is '{ours}'"):
            require_matches([theirs], paths, "method.train_also")
