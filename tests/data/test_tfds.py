"""TensorFlow Datasets, of a builder of one's own, without TensorFlow."""

from __future__ import annotations

import sys

import pytest

from jaxft.data import read_rows
from jaxft.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
BUILDER = """
import tensorflow_datasets as tfds

class Talk(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        turn = {"role": tfds.features.Text(), "content": tfds.features.Text()}
        features = {"messages": tfds.features.Sequence(turn)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for n in range(count):
            talk = [("user", f"{n}é"), ("assistant", "b")]
            yield n, {"messages": [{"role": role, "content": said} for role, said in talk]}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the module, and a place for what is prepared."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "prepared"))
    (tmp_path / "talk_builder.py").write_text(BUILDER)
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "prepared"))
    return tmp_path


def test_a_builder_of_ones_own_is_prepared_and_read(here):
    rows = list(read_rows("tfds:talk_builder.Talk:train"))
    assert sorted(row.values["messages"][0]["content"] for row in rows) == [
        f"{n}é" for n in range(5)
    ]
    assert rows[0].values["messages"][1] == {"role": "assistant", "content": "b"}
    assert rows[2].origin == "tfds:talk_builder.Talk:train:3"
    held_out = list(read_rows("tfds:talk_builder.Talk", held_out=True))
    assert len(held_out) == 2
    assert "tensorflow" not in sys.modules
    folder = next(here.rglob("features.json")).parent
    assert len(list(read_rows(f"tfds:{folder}:train[:2]"))) == 2
    assert len(list(read_rows(f"tfds:{folder.parent}"))) == 5
    with pytest.raises(UserError, match=r"no split 'trian'; there are: .*\(nearest: 'train'"):
        read_rows(f"tfds:{folder}:trian")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tfds:talk_builder.Tlk", r"talk_builder has no Tlk \(nearest: 'Talk'"),
        ("tfds:talk_bilder.Talk", "talk_bilder cannot be imported: ModuleNotFoundError"),
        ("tfds:mnits", r"no such data set \(nearest: 'mnist'"),
        ("tfds:.", "no data set that a builder wrote"),
        ("tfds:", "takes tfds:NAME or tfds:NAME:SPLIT"),
    ],
)
def test_what_is_not_there_is_one_line(here, name, message):
    with pytest.raises(UserError, match=message) as error:
        read_rows(name)
    assert "\n" not in str(error.value)
