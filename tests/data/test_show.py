"""Examples and lengths as the eye sees them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.data import Example, prepare_examples
from jaxft.data.show import COLOURS, histogram, histogram_lines, marked, plot_lengths
from jaxft.data.sources import Row
from jaxft.errors import UserError


def example_of(tokenizer, prompt, completion):
    row = Row("t:1", "prompt_completion", {"prompt": prompt, "completion": completion})
    ((example,), _) = prepare_examples([row], tokenizer, max_length=99, loss_on="completion")
    return example


def test_trained_tokens_stand_in_brackets_or_in_colour(tokenizer):
    example = example_of(tokenizer, "name: Aromi ->", " It is\nhere")
    assert marked(example, tokenizer) == "<s>name: Aromi ->[[ It is\nhere<|im_end|>]]"
    green, off = COLOURS
    assert marked(example, tokenizer, COLOURS).endswith(f"->{green} It is\nhere<|im_end|>{off}")


def test_nothing_in_the_data_steers_the_terminal(tokenizer):
    text = marked(example_of(tokenizer, "a", "\x1b[2J\x9b\r\tb"), tokenizer)
    assert text == "<s>a[[\\x1b[2J\\x9b\\r\tb<|im_end|>]]"


@given(prompt=st.text(max_size=8), completion=st.text(max_size=8), seed=st.integers(0, 99))
def test_marks_change_no_letter(tokenizer, prompt, completion, seed):
    """Whatever is trained, in whatever script, the text between the marks is the text."""
    ids = np.asarray(tokenizer.encode(prompt + completion), np.int32)
    trained = np.random.default_rng(seed).random(len(ids)) < 0.5
    plain = marked(Example(ids, np.zeros(len(ids), bool), "t:1"), tokenizer)
    text = marked(Example(ids, trained, "t:1"), tokenizer, ("\ue000", "\ue001"))
    if "\ue000" not in plain and "\ue001" not in plain:
        assert text.replace("\ue000", "").replace("\ue001", "") == plain


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50), st.integers(1, 20))
def test_a_histogram_counts_every_length_in_its_bin(lengths, bins):
    edges, counts = histogram(np.asarray(lengths), bins)
    assert counts.sum() == len(lengths)
    assert len(counts) <= bins
    for first, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        assert sum(first <= length < end for length in lengths) == count


def test_the_bar_at_which_rows_are_cut_is_marked():
    lines = histogram_lines(np.arange(1, 121), max_length=64)
    assert [line for line in lines if line.endswith("< max_length")] == [lines[6]]
    assert histogram_lines(np.arange(1, 121), max_length=119)[-1].endswith("< max_length")
    assert not any("max_length" in line for line in histogram_lines(np.arange(65), max_length=64))


def test_the_plot_is_a_png_and_nothing_is_written_over(tmp_path):
    path = tmp_path / "lengths.png"
    parts = [("training data", np.arange(1, 50)), ("held-out data", np.arange(3, 9))]
    assert plot_lengths(path, parts, max_length=40) == path
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"lengths.png: exists already; name a file that is new"):
        plot_lengths(path, parts, max_length=40)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="there is no folder"):
        plot_lengths(tmp_path / "none" / "lengths.png", parts, max_length=40)
