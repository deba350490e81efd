"""A plan is the real step, compiled from shapes."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxft
from jaxft.adaptation import partition
from jaxft.assets import tiny_folder
from jaxft.configuration import for_method, load_config
from jaxft.errors import UserError
from jaxft.formats.config_file import model_config
from jaxft.formats.merge import quantize_folder
from jaxft.planning import command, find_batch, plan, variants
from jaxft.planning.abstract import abstract_base, abstract_params
from jaxft.planning.plan import _compiled, tpu_temporaries
from jaxft.planning.topology import CHIPS, Devices, local_devices, tpu_devices
from jaxft.training.loop import train
from jaxft.training.setup import prepare_model
from jaxft.training.sharding import make_mesh

pytestmark = pytest.mark.slow

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the package libtpu"
)
SMALL = [
    "--config.data.max_length=64", "--config.batch_size=4", "--config.mesh.data=1", "--config.steps=10",
]  # fmt: skip


@pytest.fixture(autouse=True)
def usual_promotion():
    """Optax's schedules ask for it, as in training."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def config_of(method="lora", *overrides):
    plain = ("--config.dtype=float32", "--config.param_dtype=float32")
    return load_config(f"configs/sft.py:{method}", [*plain, *SMALL, *overrides])


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_several_runs_are_no_one_run():
    members = """--config.population={"optimizer.learning_rate": [1e-4, 3e-4]}"""
    with pytest.raises(UserError, match=r"tells of one run, and .* has 2 members"):
        plan(config_of("lora", members), local_devices())


def test_the_parts_are_those_of_the_loaded_model():
    config = config_of("dora")
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        _, params, method = prepare_model(config, mesh)
    trainable, frozen = partition(params, method)
    made = plan(config, local_devices())
    assert made.base_bytes + made.adapter_bytes == nbytes(trainable) + nbytes(frozen)
    assert made.optimizer_bytes == pytest.approx(2 * nbytes(trainable), rel=0.01)  # two moments
    arguments = made.base_bytes + made.adapter_bytes + made.optimizer_bytes
    assert made.peak_bytes == pytest.approx(arguments + made.temporary_bytes, rel=0.05)
    assert 0 < made.activation_bytes <= made.temporary_bytes


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("lora", {"method.init": "pissa"}),
        *(
            pytest.param("qlora", settings, marks=pytest.mark.thorough)
            for settings in (
                {"method.init": "pissa", "base.double_quant": "False"},
                {"method.init": "pissa", "base.quantize": "int8", "base.group_size": "-1"},
                {"method.init": "loftq"},
            )
        ),
        ("qlora", {"method.init": "loftq", "method.init_iterations": "2"}),
    ],
)
def test_where_adapters_begin_is_planned_without_a_decomposition(recipe, settings, monkeypatch):
    """The tree is the run's, with the frozen a0 and b0 that some starts leave."""
    settings = {"model": PACKED.parent / "trl/model", "method.rank": 2, **settings}
    config = config_of(recipe, *(f"--config.{key}={value}" for key, value in settings.items()))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        model, params, method = prepare_model(config, mesh)
        monkeypatch.setattr(np.linalg, "svd", None)
        planned_method, planned = abstract_params(config, model.config, mesh)
    assert kinds(planned) == kinds(params)
    assert planned_method == method


def kinds(tree):
    """What two trees have in common that take the same room: structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


PACKED = Path(__file__).parents[1] / "golden/packed"
STORED = {
    **{folder.name: None for folder in sorted(PACKED.iterdir())},
    "nf4": {"scheme": "nf4"},
    "fp4": {"scheme": "fp4"},
    "bitsandbytes_8bit": {"scheme": "int8"},
}


def stored(name, folder):
    """A folder that is quantized already: a golden one, or one of bitsandbytes."""
    if STORED[name] is None:
        return PACKED / name
    quantize_folder(PACKED.parent / "models/llama", folder / "stored", **STORED[name])
    return folder / "stored"


@pytest.mark.parametrize("name", STORED)
def test_a_quantized_folder_is_planned_as_it_is_loaded_from_its_configuration_alone(name, tmp_path):
    """The same weights with the same parts; where the step is compiled, the plan's bytes are those of the tree."""
    folder = stored(name, tmp_path)
    _, params = jaxft.load(folder)
    told = tmp_path / "told"
    told.mkdir()
    shutil.copy(folder / "config.json", told)
    config = config_of(
        "lora", f"--config.model={told}", "--config.data.max_length=16", "--config.method.rank=2",
        "--config.remat=none",
    )  # fmt: skip
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        planned = abstract_base(config, model_config(told), mesh)
    assert kinds(planned) == kinds(params)
    if name == "gptq":  # as of nf4 below
        assert plan(config, local_devices()).base_bytes == pytest.approx(nbytes(params), rel=0.01)


def test_the_scheme_and_block_of_a_quantized_folder_are_those_it_is_stored_in(tmp_path):
    quantize_folder(
        PACKED.parent / "models/llama", tmp_path / "stored", scheme="nf4", group_size=32
    )
    config = config_of("lora", f"--config.model={tmp_path / 'stored'}", "--config.method.rank=2")
    _, params = jaxft.load(tmp_path / "stored")
    found = plan(config, local_devices())
    assert found.quantize == "nf4"
    assert found.base_bytes == pytest.approx(nbytes(params), rel=0.01)


def test_what_a_quantized_folder_leaves_out_is_planned_dense(tmp_path):
    """By names, patterns and settings of their own, as each library has them."""

    def bytes_of(name, **settings):
        folder = tmp_path / "told"
        folder.mkdir(exist_ok=True)
        raw = json.loads((PACKED / name / "config.json").read_text())
        raw["quantization_config"] |= settings
        (folder / "config.json").write_text(json.dumps(raw))
        config = config_of("lora", f"--config.model={folder}")
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            return sum(
                leaf.size * leaf.dtype.itemsize
                for leaf in jax.tree.leaves(abstract_base(config, model_config(folder), mesh))
            )

    dense = 2 * 64 * 32 * 4  # down_proj of two layers, in float32
    packed = 2 * (64 * 32 // 2 + 64 // 16 * 32 * 5)  # codes; a scale and a zero for each group
    for name, settings in {
        "awq": {"modules_to_not_convert": ["down_proj"]},
        "packed_4bit": {"ignore": ["lm_head", "re:.*down_proj$"]},
        "gptq": {"dynamic": {"-:.*down_proj": {}}},
    }.items():
        assert bytes_of(name, **settings) - bytes_of(name) == dense - packed
    inside = [[f"self_attn.{part}_proj" for part in "qkvo"], ["mlp.gate_proj", "mlp.up_proj"]]
    fewer = bytes_of("gptq", modules_in_block_to_quantize=inside)
    assert fewer - bytes_of("gptq") == dense - packed
    with pytest.raises(
        UserError, match=r"modules_in_block_to_quantize is .*, and no lists of names"
    ):
        bytes_of("gptq", modules_in_block_to_quantize=[["mlp.up_proj"], 3])
    one = bytes_of("awq", modules_to_not_convert=["layers.0.mlp.down_proj"])
    assert one - bytes_of("awq") == dense - packed, "all layers are held dense, as they are loaded"
    with pytest.raises(UserError, match="layers of layers/mlp/down_proj/kernel are quantized in"):
        bytes_of("gptq", dynamic={"+:.*layers.0.*down_proj": {"bits": 8}})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["--config.base.quantize=nf4"], r"is quantized already \(gptq\): it is loaded as it is"),
        (["--config.method.init=pissa"], "is quantized, and its dense values are needed"),
    ],
)
def test_what_cannot_be_done_with_a_quantized_folder_is_not_planned(settings, says):
    with pytest.raises(UserError, match=says):
        plan(config_of("lora", f"--config.model={PACKED / 'gptq'}", *settings), local_devices())


def test_the_memory_is_that_of_the_step_that_trains(tmp_path, monkeypatch):
    """Within 5 % of what the compiler says of the step in the loop."""
    rows = [{"prompt": "a b", "completion": " c"}] * 4
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(
        "lora", f"--config.data.train={data}", "--config.data.packing=True", "--config.steps=1",
        "--config.checkpoint.every=0",
    )  # fmt: skip
    seen = []
    real = jax.stages.Lowered.compile

    def noted(lowered, *arguments, **options):
        compiled = real(lowered, *arguments, **options)
        seen.append(compiled.memory_analysis().temp_size_in_bytes)
        return compiled

    monkeypatch.setattr(jax.stages.Lowered, "compile", noted)
    made = plan(config, local_devices())
    assert seen == [made.temporary_bytes]
    from jaxft.training import loop

    taken = []
    dispatch = loop.Loop.dispatch

    def measured(run, *batch):
        taken.append(run)
        return dispatch(run, *batch)

    monkeypatch.setattr(loop.Loop, "dispatch", measured)
    train(config, tmp_path / "run")
    run = taken[0]
    shape = jax.eval_shape(lambda: run.standing.state)
    batch = {
        name: jax.ShapeDtypeStruct((4, 64), dtype)
        for name, dtype in (("tokens", "int32"), ("segments", "int32"), ("positions", "int32"), ("weights", "float32"))
    }  # fmt: skip
    with jax.set_mesh(make_mesh(config.mesh)):
        real(run.update.lower(shape, run.standing.frozen, batch))
        compiled = real(run.update.lower(shape, run.standing.frozen, batch))
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert made.temporary_bytes == pytest.approx(temporary, rel=0.05)


def test_a_quantized_base_is_smaller_and_a_quantized_base_does_not_train():
    dense, codes = (
        plan(config_of("lora", f"--config.base.quantize={scheme}"), local_devices())
        for scheme in ("none", "nf4")
    )
    assert codes.base_bytes < dense.base_bytes
    with pytest.raises(UserError, match="full trains the base"):
        plan(config_of("full", "--config.base.quantize=nf4"), local_devices())


def test_an_adapter_to_go_on_from_is_planned_as_it_is(tmp_path):
    """Its own rank and targets, whatever the configuration says of a fresh one."""
    method = jaxft.methods.lora(rank=3, targets=("q_proj", "o_proj"))
    _, params = jaxft.load(tiny_folder())
    adapted = jaxft.adapt(params, method, jax.random.key(0))
    jaxft.save_adapter(adapted, tmp_path / "adapter", method=method, base=str(tiny_folder()))
    made = plan(config_of("lora", f"--config.adapter={tmp_path / 'adapter'}"), local_devices())
    trained = nbytes(partition(adapted, method)[0])
    assert made.adapter_bytes == pytest.approx(trained, rel=0.001)  # the scales stand beside


def test_recomputation_costs_products_and_no_more_memory_for_activations():
    none, full = (
        plan(config_of("lora", f"--config.remat={remat}"), local_devices())
        for remat in ("none", "full")
    )
    assert none.flops < full.flops < 1.5 * none.flops
    assert full.activation_bytes < none.activation_bytes


def test_the_largest_batch_is_the_last_that_fits(monkeypatch):
    """Its search; that a plan's peak grows with the batch, and that none fits into a byte, is of real plans."""
    module = importlib.import_module("jaxft.planning.plan")
    config = config_of("lora")
    four, six = (
        plan(config_of("lora", f"--config.batch_size={rows}"), local_devices()) for rows in (4, 6)
    )
    assert four.peak_bytes < six.peak_bytes
    assert four.fits

    def fitting(config, _):
        rows = config.batch_size
        return dataclasses.replace(four, batch_size=rows, fits=rows <= 5)

    with monkeypatch.context() as patch:
        patch.setattr(module, "plan", fitting)
        best, made = find_batch(config, local_devices())
    assert best is not None
    assert best.batch_size == 5
    assert [each.batch_size for each in made] == [1, 2, 4, 8, 6, 5]
    monkeypatch.setattr(module, "local_memory", lambda: 1)
    assert find_batch(config, local_devices())[0] is None


def test_variants_keep_what_is_the_users():
    config = config_of("lora", "--config.method.rank=3")
    ways = (("lora", "dora", "full"), ("none", "nf4"), ("full",))
    made = list(variants(functools.partial(for_method, config), *ways))
    names = [(each.method.name, each.base.quantize, each.remat) for each in made]
    assert names == [
        ("lora", "none", "full"), ("lora", "nf4", "full"), ("dora", "none", "full"), ("dora", "nf4", "full"),
        ("full", "none", "full"),
    ]  # fmt: skip
    assert made[0].method.rank == made[2].method.rank == 3
    assert [each.optimizer.learning_rate for each in made] == [2e-4] * 4 + [2e-5]
    assert config.remat == "none"


@pytest.mark.parametrize(
    ("topology", "says"),
    [("v9:2x2", "v4 | v5e | v5p | v6e"), ("v5e", "a shape, as v5e:4x4"), ("", "--device local")],
)
def test_what_is_no_topology_is_one_line(topology, says):
    with pytest.raises(UserError, match=says.replace("|", r"\|")):
        command.main(config_of(), topology=topology) if not topology else tpu_devices(topology)


def test_the_command_prints_json_a_table_the_sharding_and_draws(tmp_path, capsys):
    config = config_of("lora")
    command.main(config, device="local", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert {
        "topology", "devices", "peak_bytes", "base_bytes", "adapter_bytes", "optimizer_bytes", "temporary_bytes",
        "fits", "flops", "seconds_per_step",
    } <= set(found)  # fmt: skip
    chart = tmp_path / "plan.png"
    command.main(config, device="local", methods="lora,vera", plot=str(chart), price=2.0)
    table = capsys.readouterr().out
    assert [line[2:6] for line in table.splitlines()[2:]] == ["lora", "vera"]
    assert table.count("*") == 1
    assert chart.stat().st_size > 10_000
    with pytest.raises(UserError, match="exists and is not written over"):
        command.main(config, device="local", plot=str(chart))
    command.main(config, device="local", show=True)
    assert "layers/attention/q_proj/kernel/base" in capsys.readouterr().out
    with pytest.raises(UserError, match="nearest: 'dora'"):
        command.main(config, device="local", methods="doora")


@needs_compiler
@pytest.mark.filterwarnings("ignore")
def test_a_slice_is_planned_without_one():
    config = config_of("lora", "--config.mesh.fsdp=4", "--config.remat=full")
    made = plan(config, tpu_devices("v5e:2x2"))
    assert made.devices == 4
    assert made.fits
    assert made.seconds_per_step > 0
    assert made.exchanged_bytes > 0
    assert isinstance(tpu_devices("v5e:2x2"), Devices)


@needs_compiler
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
def test_one_chip_alone_is_a_slice(topology):
    assert len(tpu_devices(topology).devices) == 1


def test_a_program_that_jax_cannot_read_is_one_clear_line(monkeypatch):
    class Compiled:
        def memory_analysis(self):
            return types.SimpleNamespace(**dict.fromkeys(SIZES, 0))

        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    lowered = types.SimpleNamespace(compile=lambda compiler_options: Compiled())
    monkeypatch.setitem(_compiled.__globals__, "version", lambda package: "0.0.1")
    with pytest.raises(
        UserError, match=r"cannot read what libtpu 0\.0\.1 made of the step: pip install"
    ):
        _compiled(lowered, 0, Devices("v6e:1x1", (), CHIPS["v6e"], (1, 1)), {})


SIZES = (
    "argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes", "temp_size_in_bytes",
    "peak_memory_in_bytes",
)  # fmt: skip


def test_a_tpu_programs_temporaries_count_a_gap_once():
    """The figures of a program that the compiler refused at 2.94 GiB, where it said: 516 MiB, of which gaps are 81."""
    analysis = types.SimpleNamespace(
        temp_size_in_bytes=625799104,
        peak_memory_in_bytes=3148618976,
        argument_size_in_bytes=2614428672,
    )
    assert 516.1 * 2**20 < tpu_temporaries(analysis) < 1.08 * 516.1 * 2**20
    analysis.peak_memory_in_bytes = 2 * 3148618976
    assert tpu_temporaries(analysis) == 625799104


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.", (20.0, 16.0, 15.75)),
        (
            "CompileTimeHbmOom: the total memory required for HLO temporaries (25.50G) exceeds"
            " available HBM (15.75G).",
            (25.5, 21.5, 15.75),
        ),
    ],
)
def test_a_step_that_the_compiler_refuses_tells_its_memory(said, told):
    """The compiler has two ways to say it, arguments included; any other error is an error."""

    class Lowered:
        def compile(self, compiler_options):
            raise RuntimeError(said)

    target = Devices("v5e:1x1", (), CHIPS["v5e"], (1, 1))
    *sizes, program = _compiled(Lowered(), 4 * 2**30, target, {})
    assert [size / 2**30 for size in sizes] == pytest.approx(told)
    assert program is None
    said = "INTERNAL: something else"
    with pytest.raises(RuntimeError, match="something else"):
        _compiled(Lowered(), 0, target, {})
