"""`jaxft.compare` on a tiny model: what it writes, that it goes on and repeats, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from markupsafe import escape

from jaxft.comparison.compare import compare
from jaxft.comparison.levers import LEVERS, middle_of
from jaxft.configuration import load_config
from jaxft.errors import UserError
from tests.small_runs import GOLDEN

RECIPE = str(Path(__file__).parents[2] / "configs" / "compare.py")
ROWS = (GOLDEN / "data.jsonl").read_text().splitlines()
# Whose values change from one time to the next.
TIMED = ("seconds", "search_seconds", "price", "added_seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Rows that train, rows that test, and a document."""
    folder = tmp_path_factory.mktemp("rows")
    contents = {"train": ROWS[:30], "test": ROWS[40:60], "few": ROWS[60:66]}
    contents["same"] = [*ROWS[40:58], *ROWS[:3]]
    for name, rows in contents.items():
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    pairs = [{**json.loads(row), "rejected": " I do not know."} for row in ROWS[:60]]
    texts = [json.dumps({**row, "chosen": row.pop("completion")}) for row in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(texts[:30]) + "\n")
    (folder / "test pairs.jsonl").write_text("\n".join(texts[30:]) + "\n")
    (folder / "document.txt").write_text("Greta is a beekeeper near the harbour.\n" * 3)
    found = {name: str(folder / f"{name}.jsonl") for name in (*contents, "pairs", "test pairs")}
    return {**found, "document": str(folder / "document.txt")}


@pytest.fixture(scope="module")
def configured(files: dict[str, str]) -> Callable[..., Any]:
    """A small comparison's configuration."""

    def make(**overrides: Any) -> Any:
        small = {
            "model": str(GOLDEN / "model"),
            "data.train": files["train"],
            "data.eval": files["test"],
            "data.max_length": 64,
            "data.packing": True,
            "levers": ("prompt", "lora"),
            "budget": "0",
            "steps": 4,
            "batch_size": 4,
            "seeds": 2,
            "max_new_tokens": 4,
            "search.rates": 1,
            "search.widen": 0,
            "search.parts": (1.0,),
            "settings": {"method.rank": 4, "mesh.data": 1},
        }
        return load_config(RECIPE, small | overrides)

    return make


@pytest.fixture(scope="module")
def whole(configured: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that nothing happened to; beside it, in said.txt, what it said."""
    folder, said = tmp_path_factory.mktemp("whole") / "run", io.StringIO()
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(said),
    ):
        patch.setattr("jaxft.comparison.compare.EARLY", 1e-3)  # by then the model is asked
        compare(configured(metric="loss"), folder)
    (folder.parent / "said.txt").write_text(said.getvalue())
    return folder


def test_what_is_ruled_out_is_said_in_the_midst_of_a_piece(whole: Path) -> None:
    """When its time has come, whatever is under way, and once."""
    said = (whole.parent / "said.txt").read_text().splitlines()
    (early,) = [line for line in said if line.startswith("after ")]
    assert early.endswith("0 of 2 levers measured: nothing is ruled out yet")
    assert said.index(early) < next(n for n, line in enumerate(said) if "asked for" in line)


def result_of(folder: Path) -> dict[str, Any]:
    """RUN/comparison.json without what the clock says."""
    found: dict[str, Any] = json.loads((folder / "comparison.json").read_text())
    del found["seconds"]
    for lever in found["levers"]:
        for key in TIMED:
            lever.pop(key, None)
    found["verdict"]["sentences"] = [found["verdict"]["sentences"][0]]  # the second tells seconds
    return found


def test_every_field_of_a_measured_lever_is_there(whole: Path) -> None:
    """A row a lever: score, difference, what it costs, what was tried, and what it says."""
    found = json.loads((whole / "comparison.json").read_text())
    levers = {lever["name"]: lever for lever in found["levers"]}
    prompt, lora = levers["prompt"], levers["lora"]
    assert (found["done"], found["steps"], found["metric"]["name"]) == (True, 4, "loss")
    assert found["rows"] == {"train": 20, "tuning": 10, "test": 20, "overlap": []}
    assert prompt["difference"] is None
    assert (prompt["parameters"], prompt["untouched"], prompt["runs"]) == (0, None, [])
    assert lora["score"]["n"] == lora["difference"]["n"] == 20
    assert lora["seeds"] == [1, 2]
    assert len(lora["scores"]) == 2
    assert lora["searched"][0] | {"value": 0} == {
        "setting": {"rate": middle_of(LEVERS["lora"], 48)},
        "value": 0,
        "name": "held-out loss",
        "part": 1.0,
    }
    for key in ("parameters", "bytes", "memory", "tokens_per_second", "seconds", "search_seconds"):
        assert lora[key] > 0, key
    assert lora["untouched"]["n"] == 24
    assert [one["prompt"] for one in lora["samples"]] == [
        one["prompt"] for one in prompt["samples"]
    ]
    assert all((whole / run / "metrics.jsonl").is_file() for run in lora["runs"])
    assert lora["memory"] < 2e7  # the share of one
    assert levers["full"]["reason"] == "config.levers does not name it"
    assert len(found["verdict"]["sentences"]) == 2


def test_settings_reach_the_runs(whole: Path) -> None:
    """Every lever trains on the same rows, with the seeds after the comparison's, and never on the test's."""
    found = json.loads((whole / "comparison.json").read_text())
    lora = next(lever for lever in found["levers"] if lever["name"] == "lora")
    configs = [json.loads((whole / run / "config.json").read_text()) for run in lora["runs"]]
    assert [config["seed"] for config in configs] == [43, 44]
    assert {config["method"]["rank"] for config in configs} == {4}
    train = Path(configs[0]["data"]["train"]).read_text()
    tuning = Path(configs[0]["data"]["eval"]).read_text()
    tested = [json.loads(row)["prompt"] for row in ROWS[40:60]]
    assert not any(prompt in train + tuning for prompt in tested)


def test_the_folder_has_a_page_with_the_verdict(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    found = result_of(whole)
    for sentence in found["verdict"]["sentences"]:
        assert str(escape(sentence)) in page
    left = "".join(re.findall(r"<li><bdi>(.*?)</li>", page))
    for lever in found["levers"]:
        if lever["reason"]:
            assert str(escape(lever["title"])) in left
            assert str(escape(lever["reason"])) in left
        else:
            assert f"<bdi>{lever['name']}</bdi>" in page


def test_a_comparison_that_was_cut_short_goes_on(
    whole: Path, configured: Callable[..., Any], tmp_path: Path
) -> None:
    """What the ledger has is not done again, and the end is the same, bit for bit."""
    folder = tmp_path / "run"
    folder.mkdir()
    kept = (whole / "ledger.jsonl").read_text().splitlines(keepends=True)
    for part in ("answers", "aside", "runs"):
        shutil.copytree(whole / part, folder / part)
    shutil.copy(whole / "config.json", folder)
    (folder / "ledger.jsonl").write_text("".join(kept[:-3]) + kept[-3][:20])
    for ended in folder.glob(
        "runs/*/members/*/ended.json"
    ):  # killed before the members' last words
        ended.unlink()
    compare(configured(metric="loss"), folder)
    assert result_of(folder) == result_of(whole)
    again = (folder / "ledger.jsonl").read_text().splitlines(keepends=True)
    assert again[:-3] == kept[:-3]
    assert [json.loads(line).get("value") for line in again] == [
        json.loads(line).get("value") for line in kept
    ]


def test_a_comparison_that_is_done_says_the_same_again(
    whole: Path, configured: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "ledger.jsonl").read_bytes()
    again = compare(configured(metric="loss", price_per_hour=2.0), whole)
    assert again == json.loads((whole / "comparison.json").read_text())
    assert (whole / "ledger.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"another comparison stands there.*steps: 4 -> 5"):
        compare(configured(metric="loss", steps=5), whole)


@pytest.mark.thorough  # the same law as above, of a whole comparison
def test_a_repetition_gives_the_same_bits(whole: Path, tmp_path: Path) -> None:
    """RUN/repeat.json is all that it takes."""
    compare(load_config(str(whole / "repeat.json")), tmp_path / "run")
    ours, theirs = result_of(tmp_path / "run"), result_of(whole)
    for found in (ours, theirs):
        del found["budget"]
    assert ours == theirs
    for file in (whole / "answers").iterdir():
        assert (tmp_path / "run" / "answers" / file.name).read_text() == file.read_text()


def test_what_the_data_do_not_allow_is_named(
    configured: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A lever asked for by name says what it lacks."""
    with pytest.raises(UserError, match="dpo: the training rows have no chosen and rejected"):
        compare(configured(levers=("dpo", "retrieval")), tmp_path / "run")
    with pytest.raises(UserError, match=r"unknown lever 'lorra' \(nearest: 'lora'"):
        compare(configured(levers=("lorra",)), tmp_path / "other")


def test_too_few_rows_say_how_many_are_needed(
    configured: Callable[..., Any], files: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match="6 questions: too few for any verdict, which needs at least 20"
    ):
        compare(configured(**{"data.eval": files["few"]}), tmp_path / "a")
    with pytest.raises(UserError, match="6 questions: too few to tune"):
        compare(configured(**{"data.train": files["few"]}), tmp_path / "b")


def test_test_rows_that_train_are_named_and_left_out(
    configured: Callable[..., Any], files: dict[str, str], tmp_path: Path
) -> None:
    """Here so many that too few are left."""
    with pytest.raises(
        UserError, match=r"18 questions \(and 3 that stand in the training rows too, first .*:19\)"
    ):
        compare(configured(**{"data.eval": files["same"]}), tmp_path / "run")


def test_a_budget_that_no_lever_fits_into_is_refused(
    configured: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"config\.budget 0\.001s: not even one lever fits"):
        compare(configured(budget="0.001s"), tmp_path / "run")


def test_a_grader_that_gives_one_value_to_all_is_refused(
    configured: Callable[..., Any], tmp_path: Path
) -> None:
    grader = {"type": "regex", "name": "any", "pattern": ""}
    with pytest.raises(UserError, match="grader 'any' gives 1 to all of 33 answers"):
        compare(configured(graders=json.dumps([grader])), tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("budget", "soon", "config.budget takes a time, such as 90s, 30m or 2h, not 'soon'"),
        ("memory", "much", "config.memory takes a size"),
        ("levrs", "lora", "no key config.levrs .nearest: config.levers"),
        ("search.factor", "1", "config.search.factor takes a number above 1"),
        ("search.parts", "0.5,0.2", "config.search.parts takes parts of a run"),
        ("seeds", "1", "config.seeds takes a number of at least 2, not 1"),
        ("data.chat", "maybe", "config.data.chat takes auto"),
    ],
)
def test_a_wrong_value_is_one_line(key: str, value: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config(RECIPE, [f"--config.{key}={value}"])


@pytest.mark.thorough
def test_pairs_and_documents_bring_their_levers(
    configured: Callable[..., Any], files: dict[str, str], tmp_path: Path
) -> None:
    """Pairs are judged by preference; DPO is then a lever, and retrieval with documents."""
    config = configured(
        levers=("prompt", "retrieval", "dpo"),
        **{
            "data.train": files["pairs"],
            "data.eval": files["test pairs"],
            "data.documents": (files["document"],),
            "data.packing": False,
        },
    )
    found = compare(config, tmp_path / "run")
    measured = [lever["name"] for lever in found["levers"] if not lever["reason"]]
    assert measured == ["prompt", "retrieval", "dpo"]
    assert found["metric"]["name"] == "preference_accuracy"
    retrieval = next(lever for lever in found["levers"] if lever["name"] == "retrieval")
    assert retrieval["added_tokens"] > 0
    assert retrieval["bytes"] > 0


@pytest.mark.thorough
def test_a_grader_brings_reinforcement(
    configured: Callable[..., Any], files: dict[str, str], tmp_path: Path
) -> None:
    """The grade is the metric, and the runs learn from it; settings that rollouts alone have reach them alone."""
    grader = {"type": "regex", "name": "vowel", "pattern": "[aeiou]"}
    config = configured(
        levers=("prompt", "reinforcement"),
        graders=json.dumps([grader]),
        steps=2,
        settings={"method.rank": 4, "mesh.data": 1, "rollout.group": 2},
    )
    found = compare(config, tmp_path / "run")
    assert found["metric"]["name"] == "grader/vowel"
    lever = next(lever for lever in found["levers"] if lever["name"] == "reinforcement")
    assert not lever["reason"]
    assert lever["signal"] == "rewards"
    assert lever["searched"][0]["name"] == "held-out reward"
