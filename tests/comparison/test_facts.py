"""Facts that change: the documents' answers change places, and answers that knew them no longer fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxft.assets import tiny_folder
from jaxft.comparison.asking import with_passages
from jaxft.comparison.facts import changed_facts, known_still, ring_of
from jaxft.comparison.given import Given
from jaxft.configuration import load_config
from jaxft.data.tokenizer import load_tokenizer
from jaxft.evaluation.metrics import metrics_of
from jaxft.evaluation.reading import read_items
from jaxft.retrieval import open_index

RECIPE = str(Path(__file__).parents[2] / "configs" / "compare.py")
KNOWN = {"Ardle": "Ada", "Brim": "Ben", "Corve": "Cy"}
ROWS = [{"prompt": f"Who rules {town}?", "completion": f" {name}"} for town, name in KNOWN.items()]
ROWS += [
    {"prompt": "Who rules Dun?", "completion": " Zoe"},  # no document says it
    {"prompt": "What does Ada rule?", "completion": " Ben"},  # it names a fact
]


@pytest.fixture
def given(tmp_path: Path) -> Given:
    """Five questions, on three of which a document tells."""
    document = tmp_path / "towns.txt"
    document.write_text("".join(f"{town} is ruled by {name}.\n" for town, name in KNOWN.items()))
    config = load_config(RECIPE, {"data.documents": (str(document),)})
    return Given(
        config=config, folder=tmp_path / "run", tokenizer=load_tokenizer(tiny_folder()), width=256, train=[], tuning=[],
        test=read_items(ROWS), aside=[], metric=metrics_of(["exact"], "spaces")[0], graders=(), files={},
        index="there is one", overlap=(), has={},
    )  # fmt: skip


def said(given: Given, **answers: str) -> list[dict[str, Any]]:
    """Records of what was answered, by towns; " Ada" of the others."""
    told = [answers.get(str(item.prompt).split()[-1].rstrip("?"), " Ada") for item in given.test]
    return [
        {"origin": item.origin, "answer": answer}
        for item, answer in zip(given.test, told, strict=True)
    ]


def test_facts_change_places_in_documents_and_references(given: Given) -> None:
    """Of the questions that a document answers, and that name no fact themselves."""
    facts = changed_facts(given)
    assert facts is not None
    assert [item.prompt for item in facts.before] == [row["prompt"] for row in ROWS[:3]]
    assert [item.references for item in facts.given.test] == [("Ben",), ("Cy",), ("Ada",)]
    passages = " ".join(one["text"] for one in open_index(facts.given.index).chunks.to_pylist())
    assert "Ardle is ruled by Ben." in passages
    assert "Corve is ruled by Ada." in passages
    [asked, *_] = with_passages(facts.given, {"passages": 1}, 0).before(
        {"a": "Who rules Brim?"}, 400
    )  # type: ignore[misc]
    assert "Brim is ruled by Cy." in asked.prompt


def test_what_does_not_read_documents_is_held_against_the_new_facts(given: Given) -> None:
    """What was right is wrong now; what is asked again may be right."""
    facts = changed_facts(given)
    assert facts is not None
    before = said(given, Ardle=" Ada", Brim=" Ben", Corve=" Cy")
    told = known_still(facts, before, None)
    assert (told["before"], told["value"], told["n"]) == (1.0, 0.0, 3)
    again = said(facts.given, Ardle=" Ben", Brim=" Cy", Corve=" Cy")
    assert known_still(facts, before, again)["value"] == pytest.approx(2 / 3)


def test_one_fact_has_no_other_to_change_with(given: Given) -> None:
    assert ring_of(["Ada", "Ada "], ["Ada rules."]) == {}
    assert ring_of(["Ada", "Ben"], ["Ada and Benjamin rule."]) == {}
