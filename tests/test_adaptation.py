from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.models import Config, Transformer, module_names
from jaxft.models.transformer import initial_params
from jaxft.tree import flatten_with_paths, size_bytes
from jaxft.weights import DoRA, LoRA, is_weight, weights_of

LLAMA = Config(
    family="llama",
    vocabulary=16,
    hidden=8,
    intermediate=12,
    layers=3,
    heads=2,
    key_heads=1,
    head_dim=4,
    max_length=32,
    query_scale=0.5,
)
KEY = jax.random.key(0)
NAMES = module_names(LLAMA)
PARAMS = initial_params(LLAMA, jax.random.key(1))
TOKENS = jnp.asarray([[1, 2, 3, 4, 5]], jnp.int32)


def adapted_paths(method, **options):
    params = jaxft.adapt(PARAMS, method, KEY, names=NAMES, **options)
    return {path for path, _ in weights_of(params)}


def paths(tree):
    return {path for path, _ in flatten_with_paths(tree)}


def kernel(params, name="q_proj"):
    return params["layers"]["attention" if name[0] in "qkvo" else "mlp"][name]["kernel"]


# Targets


def test_without_targets_all_projections_are_adapted():
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    found = {path.split("/")[-2] for path in adapted_paths(jaxft.methods.lora(rank=2))}
    assert found == set(names)


def test_targets_are_patterns_over_the_kernels_paths():
    assert adapted_paths(jaxft.methods.lora(rank=2, targets=("q_proj", "mlp/*_proj", "embed"))) == {
        "layers/attention/q_proj/kernel",
        "layers/mlp/gate_proj/kernel",
        "layers/mlp/up_proj/kernel",
        "layers/mlp/down_proj/kernel",
        "embed/embedding",
    }


def test_a_tree_without_projections_has_all_its_kernels_adapted():
    tree = {
        "Dense_0": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
        "Embed_0": {"embedding": jnp.ones((5, 4))},
    }
    adapted = jaxft.adapt(tree, jaxft.methods.lora(rank=2), KEY)
    assert [path for path, _ in weights_of(adapted)] == ["Dense_0/kernel"]


def test_a_path_draws_from_a_key_of_its_own():
    """Another target more changes no other adapter's start."""
    one = jaxft.adapt(PARAMS, jaxft.methods.lora(rank=2, targets=("q_proj",)), KEY)
    two = jaxft.adapt(PARAMS, jaxft.methods.lora(rank=2, targets=("k_proj", "q_proj")), KEY)
    np.testing.assert_array_equal(kernel(one).a, kernel(two).a)
    assert not np.allclose(kernel(two).a, kernel(two, "k_proj").a)


# Patterns over Hugging Face's names


def test_rank_patterns_match_module_names_from_a_dot_on_as_in_peft():
    method = jaxft.methods.lora(
        rank=4,
        alpha=8.0,
        rank_pattern={
            r"layers\.0\.self_attn\.q_proj": 2,
            "v_proj": 3,
            r"^model\.layers\.2\.mlp\..*": 1,
        },
        alpha_pattern={r"self_attn\.q_proj": 2.0, "q_proj": 100.0},  # the first that fits wins
    )
    params = jaxft.adapt(PARAMS, method, KEY, names=NAMES)
    assert kernel(params).ranks == (2, 4, 4)
    assert kernel(params, "v_proj").ranks == (3, 3, 3)
    assert kernel(params, "k_proj").ranks == (4, 4, 4)
    assert kernel(params, "down_proj").ranks == (4, 4, 1)
    np.testing.assert_allclose(kernel(params).scale, [1.0, 0.5, 0.5])
    np.testing.assert_allclose(kernel(params, "down_proj").scale, [2.0, 2.0, 8.0])
    assert kernel(params, "v_proj").a.shape == (3, 8, 3)


def test_layers_to_transform_leaves_the_others_at_rank_zero():
    params = jaxft.adapt(
        PARAMS, jaxft.methods.dora(rank=2, layers_to_transform=(1,)), KEY, names=NAMES
    )
    assert kernel(params).ranks == (0, 2, 0)
    np.testing.assert_array_equal(kernel(params).scale > 0, [False, True, False])


def test_the_logits_of_a_fresh_adapter_are_the_bases():
    model = Transformer(LLAMA)
    expected = model.apply({"params": PARAMS}, TOKENS)
    for method in (
        jaxft.methods.rslora(
            rank=3, rank_pattern={r"layers\.1.*": 1}, targets=("*_proj", "embed", "head")
        ),
        jaxft.methods.dora(rank=2, layers_to_transform=(0, 2), rank_stabilized=True),
        jaxft.methods.vera(rank=4),
    ):
        params = jaxft.adapt(PARAMS, method, KEY, names=NAMES)
        np.testing.assert_allclose(model.apply({"params": params}, TOKENS), expected, atol=1e-5)


# What composes


def test_a_method_goes_over_another():
    """An adapter's base is any weight: here a LoRA under a DoRA, merged to the same logits."""
    first = jaxft.adapt(PARAMS, jaxft.methods.lora(rank=2, targets=("q_proj",)), KEY, names=NAMES)
    both = jaxft.adapt(first, jaxft.methods.dora(rank=1, targets=("q_proj",)), KEY, names=NAMES)
    weight = kernel(both)
    assert isinstance(weight, DoRA)
    assert isinstance(jaxft.base_of(weight), LoRA)
    model = Transformer(LLAMA)
    np.testing.assert_allclose(
        model.apply({"params": both}, TOKENS),
        model.apply({"params": jaxft.merge(both)}, TOKENS),
        atol=1e-4,
    )


def test_dora_under_lora_fas_partition():
    method = jaxft.methods.dora(rank=2, trainable=("b", "magnitude"), targets=("q_proj",))
    trainable, frozen = jaxft.partition(jaxft.adapt(PARAMS, method, KEY), method)
    assert paths(trainable) == {
        f"layers/attention/q_proj/kernel/{part}" for part in ("b", "magnitude")
    }
    assert "layers/attention/q_proj/kernel/a" in paths(frozen)


def test_train_also_names_norms_the_head_and_the_embedding():
    method = jaxft.methods.lora_fa(
        rank=2, targets=("q_proj",), train_also=("*_norm", "head", "embed/embedding")
    )
    trainable, _ = jaxft.partition(jaxft.adapt(PARAMS, method, KEY), method)
    assert paths(trainable) == {
        "layers/attention/q_proj/kernel/b",
        "layers/attention_norm/scale",
        "layers/mlp_norm/scale",
        "final_norm/scale",
        "head/kernel",
        "embed/embedding",
    }


def test_full_tuning_trains_every_leaf_and_transforms_none():
    method = jaxft.methods.full()
    params = jaxft.adapt(PARAMS, method, KEY)
    trainable, frozen = jaxft.partition(params, method)
    assert params is PARAMS
    assert paths(trainable) == paths(PARAMS)
    assert jax.tree.leaves(frozen) == []


def test_a_list_of_patterns_partitions_too():
    trainable, frozen = jaxft.partition(PARAMS, [("bias", True), ("attention_norm", True)][1:])
    assert paths(trainable) == {"layers/attention_norm/scale"}
    assert paths(trainable) | paths(frozen) == paths(PARAMS)


def test_combine_undoes_partition():
    method = jaxft.methods.dora(rank=2)
    params = jaxft.adapt(PARAMS, method, KEY)
    both = jaxft.combine(*jaxft.partition(params, method))
    assert jax.tree.structure(both) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(params), strict=True))


def test_the_adapters_dtype_is_its_own():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    params = jaxft.adapt(half, jaxft.methods.dora(rank=2), KEY)
    weight = kernel(params)
    assert {part.dtype for part in (weight.a, weight.b, weight.magnitude)} == {jnp.dtype("float32")}
    assert weight.dtype == jnp.bfloat16
    narrow = jaxft.adapt(half, jaxft.methods.lora(rank=2, dtype="bfloat16"), KEY)
    assert kernel(narrow).a.dtype == jnp.bfloat16


def test_the_trained_bytes_are_those_of_the_formula():
    """r (in + out) numbers a kernel and layer, and no more."""
    method = jaxft.methods.lora(rank=2)
    trainable, _ = jaxft.partition(jaxft.adapt(PARAMS, method, KEY), method)
    sizes = [leaf.shape[-2:] for _, leaf in flatten_with_paths(PARAMS["layers"]) if leaf.ndim == 3]
    assert size_bytes(trainable) == 4 * 3 * sum(2 * (rows + columns) for rows, columns in sizes)


def test_merging_gives_a_plain_tree_of_the_bases_shape():
    for method in (jaxft.methods.vera(rank=4), jaxft.methods.delta_lora(rank=2)):
        merged = jaxft.merge(jaxft.adapt(PARAMS, method, KEY))
        assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
        assert not any(is_weight(leaf) for leaf in jax.tree.leaves(merged, is_leaf=is_weight))


def test_adapt_and_merge_work_on_abstract_trees():
    """So that memory can be planned without a byte of the model."""
    abstract = jax.eval_shape(lambda: PARAMS)
    method = jaxft.methods.dora(rank=2)
    shapes = jax.eval_shape(lambda params: jaxft.adapt(params, method, KEY), abstract)
    assert kernel(shapes).a.shape == (3, 8, 2)
    assert jax.eval_shape(jaxft.merge, shapes)["layers"]["mlp"]["up_proj"]["kernel"].shape == (
        3,
        8,
        12,
    )


# A user's mistakes: each one line, with the nearest right name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("q_prj",)}, "method.targets: 'q_prj' matches nothing (nearest: 'q_proj'"),
        ({"targets": ("q_proj", "zzz")}, "method.targets: 'zzz' matches nothing; there are: "),
        ({"targets": ("final_norm",)}, "method.targets: 'final_norm' matches nothing"),
        (
            {"rank_pattern": {"q_prooj": 2}},
            "method.rank_pattern: 'q_prooj' fits no adapted module (nearest: ",
        ),
        (
            {"alpha_pattern": {"lm_head": 2.0}},
            "method.alpha_pattern: 'lm_head' fits no adapted module",
        ),
        ({"rank_pattern": {"q_(": 2}}, "method: pattern 'q_(' is no regular expression: missing )"),
        (
            {"layers_to_transform": (3,)},
            "method.layers_to_transform: no layer 3; the model has 0 to 2",
        ),
        ({"layers_to_transform": (-1,)}, "method.layers_to_transform: no layer -1"),
        (
            {"targets": ("head",), "layers_to_transform": (0,)},
            "every target has rank 0; nothing would",
        ),
        ({"rank": 0}, "method lora: rank takes a whole number from 1, not 0"),
    ],
)
def test_a_mistake_in_the_settings_is_one_clear_line(settings, message):
    with pytest.raises(UserError) as caught:
        jaxft.adapt(PARAMS, jaxft.methods.lora(**({"rank": 2} | settings)), KEY, names=NAMES)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_train_also_is_one_clear_line():
    method = jaxft.methods.lora(rank=2, train_also=("finalnorm",))
    with pytest.raises(
        UserError, match=r"method.train_also: 'finalnorm' matches nothing \(nearest: 'final_n"
    ):
        jaxft.partition(jaxft.adapt(PARAMS, method, KEY), method)


def test_partitioning_before_adapting_says_so():
    with pytest.raises(
        UserError, match=r"method dora: the tree holds no DoRA weight; call jaxft\.adapt"
    ):
        jaxft.partition(PARAMS, jaxft.methods.dora())
    with pytest.raises(UserError, match="partition: 'zzz' matches nothing"):
        jaxft.partition(PARAMS, [("zzz", True)])


def test_a_methods_name_is_no_method():
    with pytest.raises(
        UserError, match=r"adapt takes a method, such as jaxft.methods.dora\(\), not"
    ):
        jaxft.adapt({"a": {"kernel": jnp.ones((2, 2))}}, "dora", jax.random.key(0))
    with pytest.raises(
        UserError, match=r"partition takes a method, such as jaxft.methods.lora\(\)"
    ):
        jaxft.partition({"a": {"kernel": jnp.ones((2, 2))}}, "lroa")


def test_a_stack_of_four_axes_is_refused_until_it_is_said_what_they_are():
    """Of experts the axis behind the layers' is no input; of a module with heads it is the one before them."""
    params = {"layers": {"up_proj": {"kernel": jnp.ones((2, 3, 4, 5))}}}
    method = jaxft.methods.lora(rank=1, targets=("up_proj",))
    with pytest.raises(UserError, match=r"layers/up_proj/kernel \(2, 3, 4, 5\) is no stack"):
        jaxft.adapt(params, method, KEY)
    adapted = jaxft.adapt(params, method, KEY, contracted=(("up_proj", 1),))
    kernel = adapted["layers"]["up_proj"]["kernel"]
    assert (kernel.a.shape, kernel.b.shape) == ((2, 3, 1), (2, 1, 20))
