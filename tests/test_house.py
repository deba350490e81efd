"""The house rules that a reader relies on: which way imports run, who may ask what a weight is, where defaults live."""

from __future__ import annotations

import ast
from pathlib import Path

from jaxft.methods import METHODS
from jaxft.objectives import OBJECTIVES

PACKAGE = Path(__file__).parents[1] / "jaxft"

# A module imports only from those before it, or from its own place in the line.
ORDER = (
    ("errors", "defaults", "sequences"),
    ("runtime", "assets"),
    ("tree",),
    ("mesh",),
    ("kernels",),
    ("weights",),
    ("methods",),
    ("adaptation", "flax_modules", "quantizing", "vocabulary"),
    ("models",),
    ("configuration", "formats", "data", "objectives"),
    ("inference",),
    ("retrieval",),
    ("evaluation",),
    ("runs",),
    ("training",),
    ("planning",),
    ("comparison",),
    ("quickstart",),
    ("commands",),
    ("cli", "__main__"),
)
WEIGHTS = {
    "Weight",
    "LoRA",
    "DoRA",
    "VeRA",
    "DeltaLoRA",
    "Bank",
    "Tied",
    "TokenRows",
    "Widened",
    "Transposed",
    "Quantized",
    "Flattened",
    "Permuted",
    "LowRankStart",
    "is_weight",
}


def place_of(name: str) -> int:
    """Where a module stands in the line."""
    return next(place for place, names in enumerate(ORDER) if name in names)


def imported(tree: ast.AST) -> set[str]:
    """The parts of jaxft that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("jaxft."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "jaxft":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("jaxft.")
            }
    return found


def files() -> list[tuple[str, Path, ast.Module]]:
    """(part of jaxft, path, syntax tree) of every file of the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if first != "__init__":
            found.append((first, path, ast.parse(path.read_text())))
    return found


def test_imports_run_one_way() -> None:
    """tree, mesh, kernels, weights, methods, models, (formats, data, objectives), inference, training, cli."""
    for part, path, tree in files():
        for other in imported(tree):
            assert place_of(other) <= place_of(part), f"{path} imports {other}"


def test_only_weights_ask_what_a_weight_is() -> None:
    """Outside of weights/ nobody asks for a weight's class or for its parts: `is_adapter`, `is_encoded` tell."""
    for part, path, tree in files():
        if part == "weights":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                names = {leaf.id for leaf in ast.walk(node) if isinstance(leaf, ast.Name)}
                assert not names & WEIGHTS, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "hasattr":
                asked = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
                assert not asked & {"base", "scheme", "a"}, f"{path}:{node.lineno}"


def test_no_code_asks_for_a_methods_name() -> None:
    """A method is a row of a table: outside methods.py no name of a row is compared with anything.

    (PEFT's own three kinds, of which two are called as rows are, are compared where its files are written.)
    """
    for part, path, tree in files():
        if part in ("methods", "formats"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                texts = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
                assert not texts & set(METHODS), f"{path}:{node.lineno} {ast.unparse(node)}"


def test_no_code_asks_for_an_objectives_name() -> None:
    """An objective is a row of a table: outside of objectives/ no name of a row is compared with anything."""
    for part, path, tree in files():
        if part == "objectives":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                texts = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
                assert not texts & set(OBJECTIVES), f"{path}:{node.lineno} {ast.unparse(node)}"
                asked = {ast.unparse(leaf) for leaf in ast.walk(node)}
                assert not any(text.endswith("objective.name") for text in asked), (
                    f"{path}:{node.lineno} {ast.unparse(node)}"
                )


def test_defaults_live_in_the_recipe() -> None:
    """No `config.get(key, default)`: every default lives once, in configs/sft.py."""
    for _, path, tree in files():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                asks = node.func.attr == "get" and "config" in owner.split(".")
                assert not asks, f"{path}:{node.lineno}"


def test_files_and_functions_are_short() -> None:
    """A file of at most 500 lines, a function of at most 60 beside its docstring."""
    for _, path, tree in files():
        assert len(path.read_text().splitlines()) <= 500, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                lines -= len((ast.get_docstring(node, clean=False) or "").splitlines())
                assert lines <= 60, f"{path}:{node.lineno} {node.name} has {lines} lines"


def test_defaults_of_functions_stand_once() -> None:
    """The answer's length and the group of a scale are numbers in `defaults.py`, and nowhere else."""
    names = {"max_new_tokens", "group_size", "double_quant"}
    for _, path, tree in files():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            spec = node.args
            positional = spec.posonlyargs + spec.args
            given = list(
                zip(positional[len(positional) - len(spec.defaults) :], spec.defaults, strict=True)
            )
            given += list(zip(spec.kwonlyargs, spec.kw_defaults, strict=True))
            for argument, default in given:
                literal = isinstance(default, ast.Constant) and default.value is not None
                assert not (argument.arg in names and literal), f"{path}:{node.lineno}"
