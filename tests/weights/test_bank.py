"""A bank says of each row what the row's adapter alone says, whatever stands beside it."""

from __future__ import annotations

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxft
from jaxft.errors import UserError
from jaxft.kernels import low_rank
from jaxft.methods import METHODS
from jaxft.weights import Bank, Tied, contract_each, slots_of, stacked, written

from .conftest import BASES, IN, KINDS, VOCABULARY, make_case, normal

ADAPTERS = [name for name in KINDS.values() if name != "full"]
FIRST = ("stacked", "embedding")  # the others are thorough


@pytest.fixture(autouse=True, scope="module")
def quick_compiler():
    """Many small programs, each run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def members(base, *names, **given):
    return {name: make_case(name, BASES[base], **given).randomised() for name in names}


def bank_of(cases, **room):
    first = next(iter(cases.values()))
    trees = {name: case.params for name, case in cases.items()}
    return stacked(first.base.params, trees, **room)


def computed(base, params, x):
    """What a decoder computes of x (rows, ...) by the weight of the tree."""
    return jax.jit(BASES[base].apply)(params, x)


def assert_each_row_as_alone(base, cases, bank, groups, x):
    """Rows of a group below 0 are as of the base to the last bit."""
    found = computed(base, jaxft.bind_groups(bank, jnp.asarray(groups, jnp.int32)), x)
    trees = [*(case.params for case in cases.values()), BASES[base].params]
    alone = [computed(base, tree, x) for tree in trees]
    for row, group in enumerate(groups):
        np.testing.assert_allclose(found[row], alone[group][row], rtol=1e-5, atol=1e-4)
        if group < 0:
            np.testing.assert_array_equal(found[row], alone[group][row])


def input_of(base, rows):
    if "embedding" in base:
        return jnp.asarray(np.arange(rows) * 3 % VOCABULARY, jnp.int32)
    return normal(3, rows, IN)


@pytest.mark.parametrize(
    "base",
    [pytest.param(base, marks=[] if base in FIRST else [pytest.mark.thorough]) for base in BASES],
)
def test_every_method_mixes_on_every_base(base):
    cases = members(base, *ADAPTERS)
    groups = [0, 3, -1, 1, 2, 3, 0, -1]
    assert_each_row_as_alone(base, cases, bank_of(cases), groups, input_of(base, len(groups)))


@settings(max_examples=3, deadline=None)
@given(
    ranks=st.lists(st.sampled_from([1, 2, 5]), min_size=2, max_size=3),
    names=st.permutations(ADAPTERS),
    groups=st.lists(st.integers(-1, 2), min_size=6, max_size=6),
)
def test_any_ranks_of_any_methods_for_any_rows(ranks, names, groups):
    made = zip(names, ranks, strict=False)
    cases = {name: make_case(name, BASES["plain"], rank=rank).randomised() for name, rank in made}
    groups = [group if group < len(cases) else -1 for group in groups]
    assert_each_row_as_alone("plain", cases, bank_of(cases), groups, normal(3, 6, IN))


@settings(max_examples=12, deadline=None)
@given(
    length=st.sampled_from([1, 3]),
    count=st.sampled_from([1, 4]),
    groups=st.lists(st.integers(-1, 3), min_size=8, max_size=8),
    seed=st.integers(0, 99),
)
def test_the_ways_to_compute_it_agree(length, count, groups, seed):
    rows, draw = len(groups), np.random.default_rng(seed).standard_normal
    x, a, b, scale = (
        draw(shape, np.float32)
        for shape in ((rows, length, 5), (count, 2, 5), (count, 2, 7), (count,))
    )
    groups = np.minimum(groups, count - 1).astype(np.int32)
    zero = np.zeros((length, 7), np.float32)
    own = [scale[k] * x[n] @ a[k].T @ b[k] if k >= 0 else zero for n, k in enumerate(groups)]
    for way in (low_rank.by_row, low_rank.side_by_side, low_rank.each_low_rank):
        found = jax.jit(way)(x, a, b, scale, groups)
        np.testing.assert_allclose(found, np.stack(own), rtol=1e-5, atol=1e-4)
    runs = np.repeat(np.arange(count, dtype=np.int32), rows // count)
    laid = jax.jit(low_rank.laid_by_adapter)(x, a, b, scale)
    found = jax.jit(low_rank.by_row)(x, a, b, scale, runs)
    np.testing.assert_allclose(laid, found, rtol=1e-5, atol=1e-4)


def test_rows_may_be_laid_by_adapter_and_gradients_stay_with_their_adapter():
    cases = members("plain", "lora", "vera", "dora")
    bank, x = bank_of(cases), normal(3, 6, 2, IN)
    laid = computed("plain", bank_of(cases), x)
    by_row = computed("plain", jaxft.bind_groups(bank, jnp.asarray([0, 0, 1, 1, 2, 2])), x)
    np.testing.assert_allclose(laid, by_row, rtol=1e-5, atol=1e-5)

    def loss(weight):
        tree = {**bank, "q_proj": {"kernel": weight}}
        return jnp.sum(jnp.sin(computed("plain", tree, x)[:2]))

    slope = jax.grad(loss)(bank["q_proj"]["kernel"])
    alone = jax.grad(lambda w: jnp.sum(jnp.sin(jaxft.contract(x[:2], w))))(cases["lora"].weight)
    np.testing.assert_allclose(slope.a_rows[0, :2].T, alone.a, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(slope.b[1:], jnp.zeros_like(slope.b[1:]))
    with pytest.raises(ValueError, match="5 rows are no runs of one length for 3 adapters"):
        computed("plain", bank, x[:5])


def test_contract_takes_the_adapter_of_each_row_as_groups():
    cases = members("plain", "lora", "dora")
    weight = bank_of(cases)["q_proj"]["kernel"]
    x, groups = normal(3, 2, 3, IN), jnp.asarray([[0, 1, -1], [1, 1, 0]])
    found = jaxft.contract(x, weight, groups)
    trees = [*(case.weight for case in cases.values()), BASES["plain"].params["q_proj"]["kernel"]]
    for place in np.ndindex(groups.shape):
        alone = jaxft.contract(x[place], trees[int(groups[place])])
        np.testing.assert_allclose(found[place], alone, rtol=1e-5, atol=1e-4)


def test_weights_that_read_one_input_are_contracted_together_as_each_alone():
    bank = bank_of(members("plain", "lora", "vera"))
    weight = jaxft.bind(jaxft.bind_groups(bank, jnp.asarray([0, 1, -1])), bank)["q_proj"]["kernel"]
    x = normal(3, 3, 2, IN)
    for found in contract_each(x, [weight, weight]):
        np.testing.assert_allclose(found, jaxft.contract(x, weight), rtol=1e-6)


def test_a_tied_head_sees_the_adapters_where_all_say_so():
    params = dict(BASES["tied head"].params)
    x, found = normal(3, 2, IN), {}
    for tied in (True, False):
        chosen = {"rank": 2, "targets": ("embed/embedding",), "tie_adapters": tied}
        method = jaxft.methods.lora(**chosen)
        adapted = jaxft.adapt(params, method, jax.random.key(1))
        moved = jax.tree.map(lambda part: part, adapted)
        lora = moved["embed"]["embedding"]
        moved["embed"]["embedding"] = lora.__class__(
            lora.base, lora.a, normal(4, 2, IN), lora.scale, tie_adapters=tied, ranks=(2,)
        )
        bank = jaxft.bind_groups(stacked(params, {"a": moved}), jnp.asarray([0, -1]))
        head = jaxft.bind(bank["head"]["kernel"], bank)
        alone = jaxft.contract(x, jaxft.bind(moved["head"]["kernel"], moved))
        base = jaxft.contract(x, jaxft.bind(params["head"]["kernel"], params))
        both = jaxft.contract(x, head)
        np.testing.assert_allclose(both, [alone[0], base[1]], rtol=1e-5, atol=1e-4)
        assert bool(jnp.any(alone[0] != base[0])) == tied
        found[tied] = moved
    assert isinstance(params["head"]["kernel"], Tied)
    with pytest.raises(UserError, match="'a' and 'b' differ in tie_adapters at embed/embedding"):
        stacked(params, {"a": found[True], "b": found[False]})


def test_an_adapter_takes_anothers_index_without_a_new_program():
    cases = members("stacked", "lora", "vera", "dora")
    bank = bank_of({name: cases[name] for name in ("vera", "dora")}, slots=3, rank=4)
    assert slots_of(bank).names == ("vera", "dora", None)
    more = make_case("lora", BASES["stacked"], rank=3).randomised()
    filled = written(bank, 2, more.params, "more")
    swapped = written(filled, 0, cases["dora"].params, "again")
    x, groups = normal(3, 4, IN), jnp.asarray([0, 1, 2, -1])
    trees = [cases["dora"].params, cases["dora"].params, more.params, BASES["stacked"].params]
    bound = jaxft.bind_groups(swapped, groups)
    assert jax.tree.structure(bound) == jax.tree.structure(jaxft.bind_groups(bank, groups))
    for before, after in zip(*map(jax.tree.leaves, (bank, swapped)), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
    found = computed("stacked", bound, x)
    for row, tree in enumerate(trees):
        alone = computed("stacked", tree, x)[row]
        np.testing.assert_allclose(found[row], alone, rtol=1e-5, atol=1e-4)
    assert slots_of(swapped).names == ("again", "dora", "more")
    emptied = jaxft.bind_groups(written(swapped, 2, None, None), jnp.asarray([2] * 4))
    np.testing.assert_allclose(computed("stacked", emptied, x), computed("stacked", trees[3], x))


def test_the_base_is_taken_over_and_not_copied():
    cases = members("nf4", "lora", "dora")
    arrays = {id(leaf) for leaf in jax.tree.leaves(bank_of(cases))}
    assert all(id(leaf) in arrays for leaf in jax.tree.leaves(BASES["nf4"].params))


def test_adapters_without_room_are_refused_by_name():
    cases = members("plain", "lora", "vera", "dora")
    bank = bank_of({"lora": cases["lora"]}, slots=2)
    wide = make_case("lora", BASES["plain"], rank=3).params
    for tree, said in [
        (wide, "'x': q_proj/kernel has rank 3, and the bank's is 2"),
        (cases["dora"].params, "no room for its ratio"),
        (cases["vera"].params, "its VeRA projections are not in the bank"),
        (make_case("lora", BASES["head"]).params, "lacks q_proj/kernel: it is of another base"),
    ]:
        with pytest.raises(UserError, match=said):
            written(bank, 1, tree, "x")


def test_a_tree_that_is_not_over_this_base_is_refused():
    case, base = make_case("lora", BASES["plain"]), BASES["plain"].params
    other = jaxft.adapt({"q_proj": {"kernel": normal(9, IN, 8)}}, case.method, jax.random.key(0))
    twice = {
        "q_proj": {
            "kernel": type(case.weight)(
                case.weight, *[case.weight.a, case.weight.b, case.weight.scale]
            )
        }
    }
    for tree, said in [
        (other, "'x': q_proj/kernel is over another base"),
        (jaxft.merge(case.randomised().params), "has a q_proj/kernel of its own"),
        (twice, "LoRA over LoRA, which a bank does not hold"),
    ]:
        with pytest.raises(UserError, match=said):
            stacked(base, {"x": tree})


def test_a_bank_equals_no_one_matrix():
    bank = bank_of(members("plain", "lora"))
    assert isinstance(bank["q_proj"]["kernel"], Bank)
    with pytest.raises(UserError, match="stands for many kernels"):
        jaxft.merge(bank)


def test_every_kind_of_adapter_is_mixed_here():
    assert {METHODS[name]().weight for name in ADAPTERS} == set(KINDS) - {None}
    assert operator.contains(ADAPTERS, "vera")
