"""What is read of documents, and where each character of it stands."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxft.errors import UserError
from jaxft.retrieval.documents import Unreadable, read_documents
from jaxft.retrieval.markup import read_html


def read(*paths, **options):
    return {one.source: one for one in read_documents([*map(str, paths)], Unreadable(), **options)}


def test_every_kind_is_read_under_the_name_that_it_is_cited_by(documents):
    found = read("docs")
    names = ["docs/bridge.txt", "docs/page.html", "docs/pumps.md", "docs/rows.jsonl#tax"]
    assert list(found) == [*names, "docs/rows.jsonl:2"]
    assert " ".join(found["docs/page.html"].text.split()) == (
        "Bakers # The baker The baker & the miller are Ola Brandt."
    )
    assert found["docs/rows.jsonl:2"].text == "The mayor is called Tove."


def test_places_are_bytes_of_the_source(documents):
    for name in ("bridge.txt", "pumps.md"):
        one, data = read("docs")[f"docs/{name}"], (documents / name).read_bytes()
        assert one.text == data.decode()
        for place in range(len(one.text)):
            assert data[one.starts[place] : one.ends[place]].decode() == one.text[place]
    one, data = read("docs")["docs/page.html"], (documents / "page.html").read_bytes()
    written = [data[a:b].decode() for a, b in zip(one.starts, one.ends, strict=True)]
    assert written[one.text.index("&")] == "&amp;"
    assert "".join(written).startswith("Bakers")


def test_a_byte_order_mark_is_no_text_and_counts(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab")
    (one,) = read(tmp_path / "a.txt").values()
    assert (one.text, one.starts.tolist(), one.ends.tolist()) == ("ab", [3, 4], [4, 5])


def test_rows_come_from_parquet_and_compressed_files_too(tmp_path):
    pq.write_table(pa.table({"body": ["one", "two"], "id": [7, 8]}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", text_key="body")
    assert {name.partition("#")[2]: one.text for name, one in found.items()} == {
        "7": "one",
        "8": "two",
    }
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "x"}).encode()))
    assert [one.text for one in read(tmp_path / "b.jsonl.gz").values()] == ["x"]


def test_pages_of_a_pdf(tmp_path):
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(200, 200)
    font = pypdf.generic.DictionaryObject(
        {
            pypdf.generic.NameObject("/Type"): pypdf.generic.NameObject("/Font"),
            pypdf.generic.NameObject("/Subtype"): pypdf.generic.NameObject("/Type1"),
            pypdf.generic.NameObject("/BaseFont"): pypdf.generic.NameObject("/Helvetica"),
        }
    )
    fonts = pypdf.generic.DictionaryObject({pypdf.generic.NameObject("/F1"): font})
    page[pypdf.generic.NameObject("/Resources")] = pypdf.generic.DictionaryObject(
        {pypdf.generic.NameObject("/Font"): fonts}
    )
    drawn = pypdf.generic.DecodedStreamObject()
    drawn.set_data(b"BT /F1 12 Tf 20 100 Td (The valve opens at 3 bar.) Tj ET")
    page[pypdf.generic.NameObject("/Contents")] = writer._add_object(drawn)
    writer.write(tmp_path / "a.pdf")
    ((name, one),) = read(tmp_path / "a.pdf").items()
    assert name.endswith("a.pdf#page=1")
    assert one.text == "The valve opens at 3 bar."
    (tmp_path / "b.pdf").write_bytes(b"%PDF-1.4 nonsense")
    with pytest.raises(UserError, match=r"b\.pdf: not a PDF that can be read"):
        read(tmp_path / "b.pdf")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"a\0b", "a.txt: not text: it holds a zero byte, at 1"),
        ("a.md", b"ab\xff", "a.md: not text in UTF-8: byte 2"),
        ("a.bin", b"x", "nothing there that is read; read are .txt"),
        (
            "a.jsonl",
            b'{"txt": "x"}',
            r"a.jsonl:1: no key 'text'; keys found: 'txt' \(nearest: 'txt'\)",
        ),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: text must be a string, not a number"),
        ("a.jsonl", b'{"id":1,"text":"a"}\n{"id":1,"text":"b"}', "a.jsonl#1: this name stands"),
    ],
)
def test_what_cannot_be_read_is_named_or_left_out_on_request(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read(tmp_path / name)
    if name != "a.bin":
        left = Unreadable(skip=True)
        kept = list(read_documents([str(tmp_path / name)], left))
        assert (len(kept), len(left.files)) == (content.count(b'"a"'), 1)


def test_a_path_that_is_not_there_is_told_with_the_nearest(documents):
    with pytest.raises(UserError, match=r"docs/bridge\.tx: no such file or folder \(nearest: "):
        read("docs/bridge.tx")


def test_a_link_does_not_lead_out_of_a_folder(documents):
    (documents.parent / "secret.txt").write_text("key")
    (documents / "link.txt").symlink_to(documents.parent / "secret.txt")
    with pytest.raises(UserError, match=r"link\.txt: leads out of the folder"):
        read("docs")


def test_a_folder_tells_what_is_of_another_kind(documents):
    (documents / "photo.png").write_bytes(b"x")
    left = Unreadable()
    assert len(list(read_documents(["docs"], left))) == 5
    assert left.other == ["docs/photo.png"]


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<p>a&lt;b&#62;c&eacute;", "a<b>cé"),
        ("<pre>a\n  b</pre>", "a\n  b"),
        ("<ul><li>a<li>b</ul>", "- a\n- b"),
        ("<h2>T</h2>x", "## T\n\nx"),
        ("<script>if (a < b) {}</script>y<style>z</style>", "y"),
        ("<td>a</td><td>b</td>", "a b"),
        ("a<!-- <p>no</p> -->b", "ab"),
    ],
)
def test_html_is_read_as_a_reader_would(markup, text):
    assert read_html(markup)[0].strip() == text
