"""BM25 as bm25s scores it, exact vectors, and rankings that become one."""

import bm25s
import numpy as np
import pytest

from jaxft.errors import UserError
from jaxft.retrieval.embeddings import model_embedding, static_embedding
from jaxft.retrieval.lexical import Lexical
from jaxft.retrieval.searching import Found, best, fuse
from jaxft.retrieval.vectors import Vectors, unit

WORDS = [f"w{n}" for n in range(40)]
rng = np.random.default_rng(0)
TEXTS = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(200)]
QUERIES = ["w1 w2 w3", "w7 w7 w8", "W39", "nothing of it", ""]


def of_bm25s(texts, query):
    """What bm25s says of lists of words, which it numbers itself."""
    words = [one.split() for one in texts]
    theirs = bm25s.BM25()
    theirs.index(words, show_progress=False)
    asked = [word for word in query.lower().split() if word in theirs.vocab_dict]
    return theirs.get_scores(asked) if asked else np.zeros(len(texts), np.float32)


@pytest.mark.parametrize("query", QUERIES)
def test_scores_are_those_of_bm25s_also_after_chunks_came_and_went(query):
    index = Lexical("none")
    index.add(range(150), TEXTS[:150])
    np.testing.assert_allclose(index.scores(query), of_bm25s(TEXTS[:150], query), rtol=1e-6)
    index.remove([*range(20, 60), 999])
    index.add(range(150, 200), TEXTS[150:])
    index.arrange(np.array([*range(150, 200), *range(20), *range(60, 150)]))
    left = [*TEXTS[150:], *TEXTS[:20], *TEXTS[60:150]]
    np.testing.assert_allclose(index.scores(query), of_bm25s(left, query), rtol=1e-6)


def test_the_best_come_first_and_what_shares_no_word_does_not_come():
    index = Lexical("en")
    index.add([7, 5, 9], ["the red pump", "a red engine, red as a rose", "the sea"])
    found = index.search(["the red", "the", "SEA!"], 5)
    assert found.ids.tolist() == [[5, 7, -1, -1, -1], [-1] * 5, [9, -1, -1, -1, -1]]
    assert found.scores[0, 0] > found.scores[0, 1] > 0


def test_no_score_exceeds_the_most_that_there_is():
    index = Lexical("none")
    index.add(range(200), TEXTS)
    for query in QUERIES:
        assert index.scores(query).max() <= index.most(query) + 1e-5
    assert index.most("unheard of") > index.most("w1 w2") > index.most("") == 0


def test_bm25s_loads_the_folder(tmp_path):
    index = Lexical("none")
    index.add(range(200), TEXTS)
    index.save(tmp_path / "lexical")
    theirs = bm25s.BM25.load(tmp_path / "lexical", show_progress=False)
    np.testing.assert_array_equal(theirs.get_scores(["w1", "w2"]), index.scores("w1 w2"))
    again = Lexical.load(tmp_path / "lexical", "none")
    np.testing.assert_array_equal(again.scores("w1 w2"), index.scores("w1 w2"))


def test_words_of_scripts_without_spaces_are_letters():
    assert Lexical("none").words("Die 漢字 ist 3x") == ["die", "漢", "字", "ist", "3x"]
    assert Lexical("german").words("die Brücke") == ["brücke"]
    with pytest.raises(UserError, match=r"no stop words of 'germn' \(nearest: 'german'"):
        Lexical("germn")


def test_vectors_are_searched_exactly(monkeypatch):
    monkeypatch.setattr("jaxft.retrieval.vectors.BLOCK", 7)
    table = unit(rng.normal(size=(50, 8)))
    index = Vectors(lambda texts: table[[int(text) for text in texts]], 8)
    index.add(range(100, 150), [str(n) for n in range(50)])
    index.remove([103])
    found = index.search(["3", "4"], 5)
    near = np.delete(table, 3, axis=0) @ table[[3, 4]].T
    order = np.argsort(-near, axis=0)[:5].T
    keys = np.delete(np.arange(100, 150), 3)
    np.testing.assert_array_equal(found.ids, keys[order])
    np.testing.assert_allclose(found.scores, np.take_along_axis(near.T, order, 1), rtol=1e-6)


def test_ties_go_to_the_first():
    scores = np.float32([1, 2, 2, 0, 2])
    assert best(scores, 2).tolist() == [1, 2]
    assert best(scores, 9).tolist() == [1, 2, 4, 0, 3]
    assert best(scores, 0).tolist() == []


def test_reciprocal_ranks_are_summed():
    """1/61 + 1/62 for the one that is first and second, 1/61 or 1/62 + 1/63, ... for the others."""
    one = Found(np.array([[1, 2, 3]]), np.ones((1, 3), np.float32))
    two = Found(np.array([[2, 4, -1]]), np.ones((1, 3), np.float32))
    found = fuse([one, two], 4)
    assert found.ids.tolist() == [[2, 1, 4, 3]]
    np.testing.assert_allclose(found.scores[0], [1 / 61 + 1 / 62, 1 / 61, 1 / 62, 1 / 63], 1e-6)


def test_a_text_s_vector_does_not_depend_on_its_neighbours():
    embed, known = model_embedding("tiny", 32)
    texts = ["A pump.", "An engine that never stops, and more words.", "", "x " * 100]
    together = embed(texts * 5)
    assert set(known) >= {"model.safetensors", "tokenizer.json"}
    for place, text in enumerate(texts):
        np.testing.assert_array_equal(embed([text])[0], together[place])
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, rtol=1e-5)


def test_a_model_s_vector_is_the_mean_of_its_hidden_states():
    import jax.numpy as jnp

    import jaxft
    from jaxft.data import load_tokenizer
    from jaxft.models import hidden_states

    model, params = jaxft.load(jaxft.assets.model_folder("tiny"))
    ids = jnp.asarray([load_tokenizer("tiny").encode("An engine stops.")])
    expected = np.asarray(hidden_states(model.config, params, ids))[0].mean(axis=0)
    found = model_embedding("tiny", 32)[0](["An engine stops."])[0]
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=2e-6)


def test_static_vectors_are_wordllama_s():
    embed, known = static_embedding()
    near = embed(["a large dog", "a big hound", "the tax on salt", ""])
    assert near[0] @ near[1] > 3 * abs(near[0] @ near[2])
    assert not near[3].any()
    assert len(known) == 2


def test_static_vectors_equal_those_that_the_package_computes():
    pytest.importorskip("pydantic")  # the package itself needs it; jaxft reads its two files alone
    import tokenizers
    from wordllama.inference import WordLlamaInference

    from jaxft.retrieval.embeddings import STATIC, Path, importlib

    folder = Path(importlib.util.find_spec("wordllama").submodule_search_locations[0])
    from safetensors.numpy import load_file

    table = load_file(folder / STATIC[0])["embedding.weight"]
    theirs = WordLlamaInference(table, tokenizers.Tokenizer.from_file(str(folder / STATIC[1])))
    texts = ["a large dog", "the tax on salt is 3 crowns", "x"]
    np.testing.assert_allclose(
        static_embedding()[0](texts), theirs.embed(texts, norm=True), atol=1e-6
    )
