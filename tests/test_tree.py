from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxft
from jaxft import tree
from jaxft.errors import UserError

NAMES = st.sampled_from(["layers", "attention", "q_proj", "k_proj", "kernel", "bias", "scale"])
TREES = st.recursive(
    st.integers(),
    lambda child: st.dictionaries(NAMES, child, min_size=1, max_size=3),
    max_leaves=12,
).filter(lambda found: isinstance(found, dict))
PATTERNS = st.lists(st.tuples(NAMES | st.just("*_proj"), st.booleans()), max_size=4)


@given(TREES, PATTERNS)
def test_combine_after_partition_is_the_identity(params, patterns):
    assert tree.combine(*tree.partition(params, patterns)) == params


@given(TREES, PATTERNS)
def test_every_leaf_stands_on_one_side_as_the_first_match_says(params, patterns):
    trainable, frozen = tree.partition(params, patterns)
    chosen = {path for path, _ in tree.flatten_with_paths(trainable)}
    rest = {path for path, _ in tree.flatten_with_paths(frozen)}
    assert chosen.isdisjoint(rest)
    assert chosen == {
        path
        for path, _ in tree.flatten_with_paths(params)
        if tree.first_match(patterns, path, False)
    }


@given(TREES)
def test_combine_refuses_an_overlap_and_a_double_hole(params):
    whole, holes = params, jax.tree.map(lambda _: None, params)
    path = tree.flatten_with_paths(params)[0][0]
    with pytest.raises(ValueError, match=f"2 of 2 trees hold a leaf at {path}"):
        tree.combine(whole, whole)
    with pytest.raises(ValueError, match=f"0 of 2 trees hold a leaf at {path}"):
        tree.combine(holes, holes)


@given(TREES)
def test_a_path_matches_itself_its_ends_and_its_components(params):
    for path, _ in tree.flatten_with_paths(params):
        names = path.split("/")
        assert tree.matches(path, path)
        assert all(tree.matches(name, path) for name in names)
        assert all(tree.matches("/".join(names[i:]), path) for i in range(len(names)))


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("q_proj", "layers/attention/q_proj/kernel", True),
        ("proj", "layers/attention/q_proj/kernel", False),  # whole components, not parts of them
        ("*_proj", "layers/attention/q_proj/kernel", True),
        ("attention/*", "layers/attention/q_proj/kernel", True),
        ("attention/kernel", "layers/attention/q_proj/kernel", False),
        ("[qk]_proj/kernel/a", "layers/attention/k_proj/kernel/a", True),
        ("/layers/", "layers/norm", True),
        ("Q_proj", "layers/q_proj", False),
    ],
)
def test_patterns_are_runs_of_glob_components(pattern, path, expected):
    assert tree.matches(pattern, path) is expected


def test_the_first_match_wins():
    patterns = [("q_proj/bias", "a"), ("q_proj", "b"), ("*", "c")]
    params = {"q_proj": {"bias": 0, "kernel": 0}, "norm": 0}
    assert tree.label(params, patterns) == {"q_proj": {"bias": "a", "kernel": "b"}, "norm": "c"}


def test_a_pattern_that_matches_nothing_is_named_with_the_nearest():
    paths = ["layers/attention/q_proj/kernel", "final_norm/scale"]
    tree.require_matches(["q_proj", "scale"], paths, "method.targets")
    with pytest.raises(
        UserError, match=r"method.targets: 'q_prj' matches nothing \(nearest: 'q_proj'"
    ):
        tree.require_matches(["q_prj"], paths, "method.targets")
    with pytest.raises(
        UserError, match="there are: layers/attention/q_proj/kernel, final_norm/scale"
    ):
        tree.require_matches(["zzz"], paths, "method.targets")


def test_the_parts_of_a_weight_have_paths():
    method = jaxft.methods.lora(rank=2)
    params = jaxft.adapt({"q_proj": {"kernel": jnp.ones((4, 6))}}, method, jax.random.key(0))
    paths = [path for path, _ in tree.flatten_with_paths(params)]
    assert paths == [f"q_proj/kernel/{part}" for part in ("base", "a", "b", "scale")]


def test_counts_and_bytes_work_on_abstract_trees():
    params = {"a": jnp.zeros((3, 5), jnp.bfloat16), "b": jnp.zeros((2,), jnp.float32)}
    abstract = jax.eval_shape(lambda: params)
    assert tree.count(params) == tree.count(abstract) == 17
    assert tree.size_bytes(params) == tree.size_bytes(abstract) == 38
