"""The same protocol over LanceDB and Qdrant, the real ones, embedded, and OpenSearch's own client over a stand-in.

Where a package is not installed, a line says so.
"""

import importlib.util

import pytest

from jaxft.errors import UserError
from jaxft.retrieval import open_index, update_index
from jaxft.retrieval.stores import open_store
from tests.retrieval.opensearch_stand_in import running

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def sources(index, query, k=3):
    return [passage.source for passage in index.passages(index.search([query], k))[0]]


def closed(index):
    """Qdrant's folder is locked as long as a client has it."""
    for part in index.parts.values():
        if hasattr(part, "client"):
            part.client.close()


@pytest.fixture
def url():
    pytest.importorskip("opensearchpy")
    with running() as (address, _):
        yield address


@pytest.mark.parametrize("embed", ["none", "static"])
def test_opensearch_finds_what_is_in_the_index_as_it_changes(documents, url, embed):
    test_a_store_finds_what_is_in_the_index_as_it_changes(
        documents, f"opensearch:{url}", "opensearchpy", embed
    )


def test_opensearch_tells_what_is_wrong_without_the_password(url):
    port = url.rpartition(":")[2]
    with pytest.raises(UserError, match=r"^opensearch:127.0.0.1:1: ConnectionError") as told:
        open_store("opensearch:http://admin:secret@127.0.0.1:1", None)
    assert "secret" not in str(told.value)
    with pytest.raises(UserError, match="write opensearch:https://USER:PASSWORD@HOST:9200"):
        open_store(f"opensearch:localhost:{port}", None)


@pytest.mark.parametrize(
    ("store", "package", "embed"),
    [
        ("lancedb:STORE", "lancedb", "none"),
        ("lancedb:STORE", "lancedb", "static"),
        ("qdrant:STORE", "qdrant_client", "static"),
    ],
)
def test_a_store_finds_what_is_in_the_index_as_it_changes(documents, store, package, embed):
    pytest.importorskip(package)
    settings = {"tokens": 48, "embed": embed, "store": store}
    index, _ = update_index("INDEX", ["docs"], settings)
    assert sources(index, "how long is the bridge")[0] == "docs/bridge.txt"
    assert index.confidence("how long is the bridge") > index.confidence("zebra")
    closed(index)
    (documents / "bridge.txt").write_text("A ferry took its place.")
    (documents / "page.html").unlink()
    index, report = update_index("INDEX", ["docs"])
    assert (report.changed, report.removed, report.kept) == (1, 1, 3)
    assert sources(index, "ferry")[0] == "docs/bridge.txt"
    assert "docs/page.html" not in sources(index, "the baker and the miller", 9)
    closed(index)
    index = open_index("INDEX")
    assert sources(index, "the tax on salt")[0] == "docs/rows.jsonl#tax"
    closed(index)


@pytest.mark.parametrize("kind", ["qdrant", "opensearch"])
def test_vectors_of_a_store_are_ranked_as_here(documents, kind, request):
    pytest.importorskip("qdrant_client")
    location = ":memory:" if kind == "qdrant" else request.getfixturevalue("url")
    settings = {"tokens": 48, "embed": "static"}
    here, _ = update_index("HERE", ["docs"], settings)
    there, _ = update_index("THERE", ["docs"], settings | {"store": f"{kind}:{location}"})
    for query in ("a large pump", "who bakes bread"):
        ours, theirs = (one.search([query], 5, "dense") for one in (here, there))
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("opensearh:x", r"no such store \(nearest: 'opensearch'\)"),
        ("lanced:x", r"no such store \(nearest: 'lancedb'\)"),
        ("qdrant", "no such store"),
    ],
)
def test_a_store_that_cannot_be_served_is_refused_by_name(name, said):
    with pytest.raises(UserError, match=said):
        open_store(name, None)


@pytest.mark.parametrize(
    ("kind", "package"),
    [("lancedb", "lancedb"), ("qdrant", "qdrant_client"), ("opensearch", "opensearchpy")],
)
def test_a_package_that_is_missing_is_named(kind, package):
    if importlib.util.find_spec(package) is not None:
        pytest.skip("it is installed")
    with pytest.raises(UserError, match=rf"pip install 'jaxft\[{kind}\]'"):
        open_store(f"{kind}:x", None)
