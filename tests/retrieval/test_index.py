"""An index's folder: the same bytes by any way, brought up to date in parts, and refused where it is not sound."""

import json
import shutil

import numpy as np
import pytest

from jaxft import cli
from jaxft.errors import UserError
from jaxft.formats.manifest import NAME
from jaxft.retrieval import building, open_index, update_index
from jaxft.runtime.storage import files_under

EMBEDS = [{}, {"embed": "static"}, {"embed": "model", "embed_model": "tiny"}]


def sources(index, query, **options):
    (found,) = index.passages(index.search([query], 3, **options))
    return [passage.source for passage in found]


def content(folder):
    return {name: path.read_bytes() for name, path in files_under(folder).items()}


@pytest.mark.parametrize("embed", EMBEDS)
def test_an_index_brought_up_to_date_has_the_bytes_of_a_new_one(documents, embed, monkeypatch):
    settings = {"tokens": 48, **embed}
    update_index("INDEX", ["docs"], settings)
    (documents / "bridge.txt").write_text("The bridge fell down.")
    (documents / "page.html").unlink()
    (documents / "new.md").write_text("A new pump that is green.")
    seen = []
    monkeypatch.setattr(
        building, "cut", lambda one, *rest: seen.append(one.source) or CUT(one, *rest)
    )
    index, report = update_index("INDEX", ["docs"])
    assert seen == ["docs/bridge.txt", "docs/new.md"]  # the others are not looked at again
    assert (report.added, report.changed, report.removed, report.kept) == (1, 1, 1, 3)
    update_index("FRESH", ["docs"], settings)
    assert content(documents.parent / "INDEX") == content(documents.parent / "FRESH")
    assert sources(index, "which green pump")[0] == "docs/new.md"
    assert "docs/page.html" not in sources(index, "the baker and the miller")
    assert sources(open_index("INDEX"), "green pump") == sources(index, "green pump")


CUT = building.cut


def test_other_paths_stay_and_can_be_removed(index, tmp_path):
    (tmp_path / "more.txt").write_text("A windmill stands on the hill.")
    before = content(index)
    found, report = update_index("INDEX", ["more.txt"])
    assert (report.added, report.kept) == (1, 5)
    assert sources(found, "windmill") == ["more.txt"]
    found, report = update_index("INDEX", [], removed=["more.txt"])
    assert report.removed == 1
    assert content(index) == before
    with pytest.raises(UserError, match=r"INDEX: holds no document of more\.txt"):
        update_index("INDEX", [], removed=["more.txt"])


def test_nothing_is_written_where_nothing_changed(index):
    before = {path: path.stat().st_mtime_ns for path in files_under(index).values()}
    _, report = update_index("INDEX", ["docs"], {"tokens": 48})
    assert str(report) == "5 documents (5 as before), 7 chunks"
    assert before == {path: path.stat().st_mtime_ns for path in files_under(index).values()}


def test_a_passage_is_the_bytes_of_its_source(index, documents):
    (found,) = open_index("INDEX").passages(open_index("INDEX").search(["bridge of Östby"], 1))
    data = (documents.parent / found[0].source).read_bytes()
    assert data[found[0].start : found[0].end].decode() == found[0].text
    assert found[0].text.startswith("The bridge of Östby")


def test_a_section_is_found_by_its_heading(documents):
    (documents / "long.md").write_text("# Windmills\n\n" + "It turns and turns around. " * 30)
    index, _ = update_index("INDEX", ["docs/long.md"], {"tokens": 48})
    assert len(index) > 3
    assert len(index.passages(index.search(["windmills"], 9))[0]) == len(index)


def test_hybrid_is_the_fusion_of_both(documents):
    index, _ = update_index("INDEX", ["docs"], {"tokens": 48, "embed": "static"})
    for how in ("lexical", "dense", "hybrid"):
        assert sources(index, "how long is the bridge", how=how)[0] == "docs/bridge.txt"
    assert index.search(["bridge"], 3).scores.max() == pytest.approx(2 / 61)
    with pytest.raises(UserError, match="FRESH: has no dense search; it has: lexical"):
        update_index("FRESH", ["docs"])[0].search(["a"], 1, "dense")


def test_every_damaged_file_is_noticed(index, tmp_path):
    names = sorted(set(files_under(index)) - {NAME})
    assert len(names) == 10
    for name in names:
        copy = shutil.copytree(index, tmp_path / "copy")
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(UserError, match=f"copy: damaged: {name} .* is not what was written"):
            open_index(copy)
        (copy / name).unlink()
        with pytest.raises(UserError, match=f"copy: damaged: {name} is missing"):
            open_index(copy)
        shutil.rmtree(copy)


def about(folder, **changes):
    manifest = json.loads((folder / NAME).read_text())
    manifest["index"] |= changes
    (folder / NAME).write_text(json.dumps(manifest))


def test_an_index_of_another_version_is_refused(index):
    about(index, version=2)
    with pytest.raises(UserError, match="INDEX: an index of version 2; this jaxft reads 1"):
        open_index("INDEX")
    with pytest.raises(UserError, match="of version 2"):
        update_index("INDEX", ["docs"])


def test_what_is_no_index_is_refused_and_not_written_over(documents):
    with pytest.raises(UserError, match="nowhere: no such folder; an index of documents is"):
        open_index("nowhere")
    with pytest.raises(UserError, match=r"docs: a folder without a manifest\.json"):
        open_index("docs")
    with pytest.raises(UserError, match=r"docs: a folder without a manifest\.json"):
        update_index("docs", ["docs"])
    (documents / NAME).write_text(json.dumps({"files": {"bridge.txt": "0"}}))
    with pytest.raises(UserError, match=r"docs: its manifest\.json is of something else"):
        open_index("docs")
    assert (documents / "bridge.txt").exists()


def test_parts_that_do_not_fit_are_refused(index):
    """As where somebody made the manifest fit."""
    ids = np.load(index / "lexical" / "ids.npy")
    np.save(index / "lexical" / "ids.npy", ids[::-1])
    manifest = json.loads((index / NAME).read_text())
    from jaxft.formats.manifest import digests

    manifest["files"] |= digests([index / "lexical" / "ids.npy"], ["lexical/ids.npy"])
    (index / NAME).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"INDEX: damaged: .*not of the same chunks"):
        open_index("INDEX")


def test_an_empty_index_is_refused(documents):
    (documents / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"INDEX: an empty index: 1 document \(1 added, 1 without"):
        update_index("INDEX", ["docs/empty.txt"])


def test_other_settings_are_refused(index):
    with pytest.raises(UserError, match="INDEX: is an index with tokens 48, not 64: take another"):
        update_index("INDEX", ["docs"], {"tokens": 64})
    about(index, settings=json.loads((index / NAME).read_text())["index"]["settings"] | {
        "embed": "static", "digests": {"embed": {"a": "b"}}})  # fmt: skip
    with pytest.raises(UserError, match="wordllama: its files are not those"):
        open_index("INDEX")


def test_the_command_says_what_became_of_the_documents(documents, capsys):
    (documents / "bad.txt").write_bytes(b"\0")
    (documents / "photo.png").write_bytes(b"x")
    assert cli.main(["index", "--documents", "docs", "--output", "INDEX"]) == 2
    assert "docs/bad.txt: not text" in capsys.readouterr().err
    words = ["index", "--documents", "docs", "--output", "INDEX", "--skip-unreadable"]
    assert cli.main([*words, "--chunk-tokens", "48"]) == 0
    said = capsys.readouterr()
    assert said.out == "INDEX: 5 documents (5 added), 7 chunks\n"
    assert "left out: docs/bad.txt: not text" in said.err
    assert "1 file or row could not be read" in said.err
    assert "not read: docs/photo.png" in said.err
    assert cli.main(["index", "--output", "INDEX"]) == 2
    assert "--documents, --remove or --calibrate says what to do" in capsys.readouterr().err
