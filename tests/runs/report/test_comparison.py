"""The page of a comparison: the verdict first, and every figure that of RUN/comparison.json."""

from __future__ import annotations

import json
import shutil

import pytest

from jaxft import cli
from jaxft.runs.report.comparison import read_comparison
from jaxft.runs.report.levers import comparison_page
from tests.runs.report.made import HOSTILE, LEVERS, Read, compared, made


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """The folder of a comparison, which no test changes."""
    return compared(tmp_path_factory.mktemp("compared") / "which")


@pytest.fixture(scope="module")
def text(untouched):
    """Its page."""
    return comparison_page(read_comparison(untouched))


@pytest.fixture(scope="module")
def page(text):
    return Read(text)


@pytest.fixture
def folder(untouched, tmp_path):
    """A copy without its runs."""
    (tmp_path / "which").mkdir()
    shutil.copy(untouched / "comparison.json", tmp_path / "which")
    return tmp_path / "which"


def changed(folder, change):
    """The folder's comparison.json, after a change."""
    found = json.loads((folder / "comparison.json").read_text())
    change(found)
    (folder / "comparison.json").write_text(json.dumps(found))
    return folder


def test_verdict_comes_first_in_its_own_words(page):
    text = page.text
    said = [text.index(words) for words in ("chosen: LoRA", "Take lora: it scores 0.790", "Scores")]
    assert said == sorted(said)
    assert "1 test row left out" in text


def test_table_has_a_row_a_lever_with_the_figures_of_the_file(page):
    head, *rows = next(table for table in page.tables if "when the facts change" in table[0])
    assert [row[0] for row in rows] == [row[0] for row in LEVERS]
    lora = dict(zip(head, rows[3], strict=True))
    assert lora["f1"] == "0.7900"
    assert lora["beside the simplest"] == "+0.6700"
    assert lora["trained parameters"] == "299,008"
    assert lora["bytes that are kept"] == "1.15 MiB"
    assert lora["memory of an update"] == "56.9 MiB"
    assert lora["time of a tuning run"] == "54 s"
    assert "price of a tuning run" not in head  # nobody said what an hour costs
    assert "+0.6300 to +0.7100: better" in page.text


def test_what_is_left_once_the_facts_have_changed_stands_beside_what_was_before(page):
    """Of retrieval and raft, which are asked again; the others have no figure."""
    head, *rows = next(table for table in page.tables if "when the facts change" in table[0])
    after = [row[head.index("after the facts have changed")] for row in rows]
    assert dict(zip((row[0] for row in rows), after, strict=True)) | {
        "retrieval": "0.1300",
        "raft": "0.3300",
        "lora": "–",
    } == dict(zip((row[0] for row in LEVERS), after, strict=True))
    assert "0.0800 to 0.1800; before 0.6300" in page.text


def test_levers_that_were_left_out_are_named_with_the_reason(page):
    assert "full tuning : no time was left for it" in " ".join(page.text.split())


def test_each_lever_is_drawn_as_what_it_is_with_its_own_figures(text):
    for said in (
        "no weight changes. f1 0.1200 (0.0900 to 0.1500).",
        "in every request: no weight changes. f1 0.3100",
        "169 tokens more.",
        "W is frozen; d and g train",
        "held as codes (nf4)",
        "a, b and m train",
        "68.5 KiB kept, 69.0 MiB an update",
        "2.7 million frozen",  # of the run that is there
    ):
        assert said in text
    assert (
        text.count("finds passages for the question") == 2
    )  # retrieval, and LoRA that reads passages
    assert "The better of two" in text


def test_scores_and_costs_have_their_data_behind_them(page):
    scores = next(table for table in page.tables if table[0] == ["lever", "f1"])
    assert ["raft", "0.8300 (0.7900 to 0.8700)"] in scores
    costs = next(table for table in page.tables if table[0][1:2] == ["tokens more a request"])
    assert ["retrieval", "169", "0.6300 (0.5800 to 0.6800)"] in costs


def test_curves_are_those_of_the_runs_that_are_there(page, folder):
    named = [table[0] for table in page.tables if table[0][0] == "updates"]
    assert ["updates", "training", "held out"] in named  # one lever an objective
    assert 'id="curves"' not in comparison_page(read_comparison(folder))


def test_samples_stand_side_by_side_by_lever(page):
    said = page.text.split("Question 1")[-1]
    assert said.count("user: Jane makes cake") == 1
    assert said.count("as in the data") == sum(row[5] > 0.6 for row in LEVERS)


def test_what_was_tried_marks_what_was_chosen(page):
    tried = next(table for table in page.tables if table[0][:2] == ["lever", "setting"])
    assert ["LoRA", "rate 0.001· chosen", "held-out loss", "0.1000", "0.2500"] in tried
    assert ["LoRA", "rate 0.0001", "held-out loss", "1.000", "0.2500"] in tried


def test_no_verdict_is_shown_as_such(folder):
    def untold(found):
        found["verdict"] |= {
            "told": "cannot tell",
            "chosen": None,
            "sentences": ["Nothing can be told."],
        }

    page = comparison_page(read_comparison(changed(folder, untold)))
    assert '<p class="told">cannot tell</p>' in page


def test_what_a_comparison_holds_is_text_wherever_it_stands(folder):
    def hostile(found):
        found["model"] = found["device"] = found["metric"]["name"] = HOSTILE
        for key in ("title", "facts", "name"):
            found["levers"][3][key] = HOSTILE
        found["levers"][3]["samples"][0] |= {
            "answer": HOSTILE,
            "prompt": [{"role": HOSTILE, "content": {"a": HOSTILE}}],
        }
        found["levers"][3]["setting"] = {HOSTILE: HOSTILE}
        found["levers"][-1] |= {"title": HOSTILE, "reason": HOSTILE}
        found["verdict"] |= {"sentences": [HOSTILE], "told": HOSTILE, "steps": [HOSTILE]}

    text = comparison_page(read_comparison(changed(folder, hostile)))
    page = Read(text)
    assert len(page.named("script")) == 1
    assert not page.named("img")
    assert "\x00" not in text
    assert text.encode()
    assert not [name for _, a in page.elements for name in a if name.startswith("on")]


def test_runs_outside_of_the_folder_are_not_read(folder, tmp_path):
    made(tmp_path / "elsewhere")

    def outside(found):
        found["levers"][3]["runs"] = ["../elsewhere", str(tmp_path / "elsewhere"), "gone"]

    assert read_comparison(changed(folder, outside)).levers[3].runs == []


def test_figures_that_are_not_known_do_not_break_the_page(folder):
    def unknown(found):
        found["levers"][3]["score"] = {"value": None, "low": None, "high": None, "n": 0}
        found["levers"][4]["score"] |= {"low": None, "high": None}
        found["levers"][4]["difference"] |= {"value": None, "low": None, "high": None}
        found["levers"][4]["searched"][0]["value"] = None

    page = Read(comparison_page(read_comparison(changed(folder, unknown))))
    assert "failed" in page.text
    assert "no interval" in page.text


def test_unfinished_comparison_is_said(folder, tmp_path, capsys):
    changed(folder, lambda found: found.update(done=False))
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    assert "which: not finished: levers are still to be measured" in capsys.readouterr().err
    assert "Not finished:" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda found: found.update(version=2), "which/comparison.json: of version 2; this jaxft reads 1"),
        (lambda found: found.pop("levers"), "not what jaxft compare writes: KeyError: 'levers'"),
        (lambda found: found["levers"][3].pop("score"), "not what jaxft compare writes: KeyError: 'score'"),
        (lambda found: found.update(levers=[]), "no lever is measured"),
        (lambda found: found.update(rows=None), "not what jaxft compare writes: TypeError"),
        (lambda found: found["levers"][4].update(recipe="configs/sft.py:lorra"), "lever vera: "),
    ],
)  # fmt: skip
def test_damaged_comparisons_are_one_clear_line(folder, tmp_path, capsys, change, line):
    changed(folder, change)
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


def test_a_comparison_has_a_page_of_its_own(folder, tmp_path, capsys):
    run = made(tmp_path / "run")
    assert cli.main(["report", str(run), str(folder), "--output", str(tmp_path / "page.html")]) == 2
    assert "a comparison, which has a page of its own; name it alone" in capsys.readouterr().err


def test_a_comparison_that_has_just_begun_is_said(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"levers": []}')
    (tmp_path / "ledger.jsonl").write_text("")
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 2
    assert "a comparison of which no lever is measured yet" in capsys.readouterr().err


def test_the_same_comparison_gives_the_same_page(folder):
    pages = {comparison_page(read_comparison(folder)) for _ in range(2)}
    assert len(pages) == 1
