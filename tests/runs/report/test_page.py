"""The page of runs: what it shows equals the files, what it is made of is text, and nothing else is needed."""

from __future__ import annotations

import json
import re

import pytest

from jaxft import cli
from jaxft.errors import UserError
from jaxft.runs.report import page_of, read_run, write_report
from tests.runs.report.made import HOSTILE, Read, made


@pytest.fixture
def pair(tmp_path):
    return [read_run(made(tmp_path / "one")), read_run(made(tmp_path / "two", "vera"))]


def test_figures_of_the_table_are_those_of_the_files(tmp_path):
    run = read_run(made(tmp_path / "one"))
    head, row = Read(page_of([run])).tables[0]
    shown = dict(zip(head, row, strict=True))
    assert shown == {
        "run": "one",
        "method": "lora",
        "signal": "sft",
        "held-out loss": "0.8125",
        "held-out exact": "0.3750",
        "trained parameters": "245,760",
        "bytes it left": "4.00 KiB",
        "memory of a step": "1.50 GiB",
        "tokens a second": "200",
        "time of its updates": "2 s",
        "updates": "4",
    }


def test_drawings_and_cards_have_the_runs_own_figures(tmp_path):
    text = Read(page_of([read_run(made(tmp_path / "one"))])).text
    for said in (
        "245,760 train",
        "2.75 million frozen",
        "r = 16",
        "4.00 KiB left, 1.50 GiB a step",
        "held-out loss 0.8125",
    ):
        assert said in text


def test_points_behind_a_plot_are_the_lines_of_the_run(tmp_path):
    page = Read(page_of([read_run(made(tmp_path / "one"))]))
    loss = next(table for table in page.tables if table[0] == ["updates", "training", "held out"])
    assert loss[1:] == [
        ["0", "", "3.250"], ["1", "3.000", ""], ["2", "1.500", ""], ["3", "1.000", ""], ["4", "0.7500", "0.8125"],
    ]  # fmt: skip


def test_a_line_of_thousands_of_steps_is_thinned_and_that_is_said(tmp_path):
    run = read_run(made(tmp_path / "long", steps=5000))
    page = page_of([run])
    assert "the mean of up to 42 updates" in page
    assert max(map(len, Read(page).tables)) < 150
    assert len(page) < 200_000


def test_page_is_well_formed_and_says_what_each_part_is(pair):
    page = Read(page_of(pair))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in ids
    for link in page.named("a"):
        assert link["href"].removeprefix("#") in ids
    for table in page.elements:
        assert table[0] != "th" or table[1]["scope"] in ("row", "col")
    assert len(page.named("caption")) == len(page.named("table"))
    pictures = [svg for svg in page.named("svg") if svg.get("aria-hidden") != "true"]
    assert pictures
    assert all(svg["role"] == "img" for svg in pictures)


def test_page_asks_for_nothing(pair):
    text = page_of(pair)
    page = Read(text)
    assert not [
        a for _, a in page.elements if {"src", "srcset", "data", "action", "style"} & a.keys()
    ]
    assert not {"link", "iframe", "object", "img"} & {tag for tag, _ in page.elements}
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert page.named("meta")[1]["content"].startswith("default-src 'none'; style-src 'sha256-")


def test_what_runs_hold_is_text_wherever_it_stands(tmp_path):
    folder = made(tmp_path / "<b>run&'\"", **{"data.train": HOSTILE[:-2]})
    sample = {"step": 4, "prompt": HOSTILE, "completion": HOSTILE, "reference": [{"role": HOSTILE}]}
    line = {"step": 4, "loss": 1.0, "exact": 0.5, "set": HOSTILE, "split": "eval"}
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps(sample) + "\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    plain = made(tmp_path / "plain")
    text = page_of([read_run(folder), read_run(plain)])
    page = Read(text)
    assert len(page.named("script")) == 1
    assert not page.named("img")
    assert not page.named("b")
    assert not [name for _, a in page.elements for name in a if name.startswith("on")]
    assert text.encode().decode() == text
    assert "owned" in page.text
    assert "\x00" not in text


def test_long_samples_are_cut_and_many_are_counted(tmp_path):
    folder = made(tmp_path / "run")
    rows = [
        {"step": 4, "prompt": f"{i}?", "completion": "x" * 9000, "reference": ""} for i in range(40)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page_of([read_run(folder)])
    assert "(7,000 more characters)" in text
    assert "28 more questions in samples.jsonl" in text


def test_samples_stand_side_by_side_and_say_which_agree(pair):
    page = Read(page_of(pair))
    said = page.text.split("What it said")[-1]
    assert said.count("How many?") == 1
    assert said.count("as in the data") == 2
    assert "Hm." not in said  # several runs: what they said last


def test_settings_that_differ_are_shown_and_no_others(pair):
    table = Read(page_of(pair)).tables[-1]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["method.name"] == ["lora", "vera"]
    assert rows["method.rank"] == ["16", "256"]
    assert "seed" not in rows


def test_the_same_runs_give_the_same_page(pair):
    assert page_of(pair) == page_of(pair)


def test_several_runs_are_not_called_better_without_an_interval(pair):
    assert "does not say which method is better" in page_of(pair)


@pytest.mark.parametrize(
    "method", ["full", "rslora", "lora_fa", "vera", "dora", "delta_lora", "qlora"]
)
def test_drawing_tells_what_trains(tmp_path, method):
    told = {
        "full": "W trains as a whole.",
        "rslora": "W is frozen; a and b train.",
        "lora_fa": "W is frozen; b trains; a stays as drawn.",
        "vera": "W is frozen; d and g train; a and b stay as drawn, and stand once for all kernels.",
        "dora": "W is frozen; a, b and m train.",
        "delta_lora": "W is frozen; a and b train; a₀ and b₀ stay as drawn.",
        "qlora": "W is frozen, held as codes (nf4) with their scales; a and b train.",
    }
    page = page_of([read_run(made(tmp_path / "run", method))])
    assert told[method] in page
    svg = page[page.index("method0-title") :].split("</svg>")[0]
    trained = len(re.findall(r'class="trained"', svg))
    assert trained == {"full": 1, "lora_fa": 1, "dora": 3}.get(method, 2)


def test_preferences_are_drawn_as_such_with_their_own_curves(tmp_path):
    page = page_of([read_run(made(tmp_path / "run", recipe="dpo"))])
    assert "The better of two" in page
    assert "lower is better" in page


def test_a_reward_is_drawn_held_to_its_start_where_a_reference_is_asked(tmp_path: Path) -> None:
    """That is where beta weighs the distance to it, and not by itself."""
    free = read_run(made(tmp_path / "free", recipe="rl"))
    held = read_run(made(tmp_path / "held", recipe="rl", **{"objective.beta": 0.1}))
    assert "held near its start" not in page_of([free])
    assert "held near its start" in page_of([held])


def test_rewards_are_drawn_as_such_with_their_own_curves(tmp_path):
    page = page_of([read_run(made(tmp_path / "run", recipe="rl"))])
    assert "A reward" in page
    assert "a grader scores each answer" in page


def test_metrics_that_were_asked_for_say_which_way_is_better(tmp_path):
    page = Read(page_of([read_run(made(tmp_path / "run"))]))
    assert "held-out exact higher is better" in " ".join(page.text.split())
    none = page_of([read_run(made(tmp_path / "none", eval_metrics=""))])
    assert "held-out exact" not in none


def test_unfinished_run_is_said(tmp_path, capsys):
    folder = made(tmp_path / "run", steps=4)
    config = json.loads((folder / "config.json").read_text()) | {"steps": 10}
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    assert "not finished: 4 of 10 updates so far" in capsys.readouterr().err
    assert "not finished: 4 of 10 updates so far" in (tmp_path / "page.html").read_text()


def test_run_of_an_earlier_version_has_a_page_without_what_it_did_not_write(tmp_path):
    folder = made(tmp_path / "run")
    (folder / "summary.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["eval_rows"]
    (folder / "config.json").write_text(json.dumps(config))
    page = page_of([read_run(folder)])
    assert "an earlier jaxft wrote none" in page
    assert "not finished" not in page


def test_run_that_has_just_begun_has_a_page(tmp_path):
    folder = made(tmp_path / "run")
    for name in ("metrics.jsonl", "samples.jsonl", "summary.json", "adapter/manifest.json"):
        (folder / name).unlink()
    page = page_of([read_run(folder)])
    assert "nothing was measured on held-out data" in page
    assert "No update is written yet" in page


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere"], "nowhere: no such folder; a run is a folder that jaxft train wrote"),
        (["empty"], "empty: no run: it holds no config.json"),
        (["file"], "file: is a file"),
        (["run", "run"], "named twice"),
        (
            ["run", "--output", "file"],
            "file: there is such a file already; name a new one, or add --force",
        ),
        (["run", "--output", "empty"], "empty: a folder; name a file for the page"),
        (["odd"], "odd/config.json:1: not JSON"),
        (["other"], "other/config.json: not a configuration"),
        (["torn"], "torn/summary.json: not the summary that jaxft train writes"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, monkeypatch, capsys, words, line):
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "run")
    made(tmp_path / "torn").joinpath("summary.json").write_text("[")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("kept")
    for name, content in (("odd", "{"), ("other", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    words = words if "--output" in words else [*words, "--output", "page.html"]
    assert cli.main(["report", *words]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"
    assert not (tmp_path / "page.html").exists()


def test_force_writes_over_a_page(tmp_path):
    folder, page = made(tmp_path / "run"), tmp_path / "page.html"
    page.write_text("old")
    with pytest.raises(UserError, match="already"):
        write_report(page, [folder])
    assert cli.main(["report", str(folder), "--output", str(page), "--force"]) == 0
    assert page.read_text().startswith("<!doctype html>")
