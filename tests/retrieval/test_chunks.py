"""Chunks: whole sentences of one section, by the model's tokens, with the bytes that they cover."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from jaxft.errors import UserError
from jaxft.retrieval.chunks import count_tokens, cut
from jaxft.retrieval.documents import Document, Unreadable, byte_offsets, read_documents


def document(text):
    places = byte_offsets(text)
    return Document("a", text, places[:-1], places[1:], "a")


def texts(text, tokenizer, most=64, overlap=0):
    return [chunk.text for chunk in cut(document(text), tokenizer, most, overlap)]


def test_sections_are_not_mixed_and_know_their_heading(tokenizer):
    text = "Before.\n\n# One\n\nA first. A second.\n\n## Two\n\n### Three\n\nA third.\n\nFour\n====\n\nEnd."
    found = cut(document(text), tokenizer, 64)
    assert [chunk.text for chunk in found] == [
        "Before.",
        "# One\n\nA first. A second.",
        "## Two\n\n### Three\n\nA third.",
        "Four\n====\n\nEnd.",
    ]
    long = "# One\n\n" + "This is a sentence of some words. " * 9
    first, *rest = cut(document(long), tokenizer, 64)
    assert first.heading == ""
    assert {chunk.heading for chunk in rest} == {"One"}


def test_sentences_stay_whole_where_they_fit(tokenizer):
    sentences = [f"The valve number {n} opens at {n} bar." for n in range(20)]
    found = texts(" ".join(sentences), tokenizer, 64)
    assert len(found) > 3
    assert " ".join(found).split(". ") == " ".join(sentences).split(". ")
    assert all(one.startswith("The valve") and one.endswith("bar.") for one in found)


def test_a_chunk_may_begin_with_the_end_of_the_one_before(tokenizer):
    sentences = [f"Valve {n} opens at {n} bar." for n in range(10)]
    found = texts(" ".join(sentences), tokenizer, 64, 32)
    for before, after in itertools.pairwise(found):
        ends = [
            before[place:] for place in range(len(before)) if before[place:].startswith("Valve")
        ]
        shared = next(end for end in ends if after.startswith(end))
        assert len(shared) < min(len(before), len(after))


ALPHABET = st.sampled_from([*"ab .\n#é漢!?<>|=-\t", "<s>", "word ", "\n\n", "# H\n", ". "])


@hypothesis.given(
    parts=st.lists(ALPHABET, max_size=200), most=st.integers(8, 40), overlap=st.integers(0, 4)
)
@hypothesis.settings(max_examples=150, deadline=None)
def test_chunks_are_the_bytes_they_name_and_cover_every_letter(tokenizer, parts, most, overlap):
    text = "".join(parts)
    data, covered = text.encode(), set()
    found = cut(document(text), tokenizer, most, overlap)
    for chunk in found:
        assert data[chunk.start : chunk.end].decode() == chunk.text
        assert chunk.text == chunk.text.strip() != ""
        covered.update(range(chunk.start, chunk.end))
    places = byte_offsets(text)
    assert all(int(places[i]) in covered for i, letter in enumerate(text) if not letter.isspace())
    assert [chunk.tokens for chunk in found] == count_tokens(tokenizer, [c.text for c in found])
    assert len({chunk.key for chunk in found}) == len(found)


def test_no_chunk_has_more_tokens_than_is_asked(tokenizer):
    text = "x" * 3000 + " " + "word and " * 500 + "漢" * 400
    found = cut(document(text), tokenizer, 32)
    assert max(chunk.tokens for chunk in found) <= 32
    assert sum(chunk.tokens for chunk in found) / len(found) > 24


def test_the_bytes_of_html_are_those_of_the_page(documents, tokenizer):
    (page,) = read_documents(["docs/page.html"], Unreadable())
    title, body = cut(page, tokenizer, 64)
    data = (documents / "page.html").read_bytes()
    assert (title.text, data[title.start : title.end]) == ("Bakers", b"Bakers")
    assert body.text.endswith("Ola Brandt.")
    assert data[body.start : body.end].endswith(b"are <b>Ola</b> Brandt.")


@pytest.mark.parametrize(("most", "overlap"), [(7, 0), (32, 17), (32, -1)])
def test_sizes_that_cannot_be_are_refused(tokenizer, most, overlap):
    with pytest.raises(UserError, match=f"chunks of {most} tokens"):
        cut(document("a"), tokenizer, most, overlap)
