"""`jaxft evaluate`: one system or several on the same items, and what was written of them compared."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxft.data.tokenizer import Tokenizer
from jaxft.defaults import MAX_NEW_TOKENS
from jaxft.errors import UserError, counted, worded
from jaxft.evaluation.comparing import compare, figures_in, read_results
from jaxft.evaluation.confidence import resamples_of
from jaxft.evaluation.contamination import Found, found_in_training
from jaxft.evaluation.evaluate import Result, check_needs, evaluate_items, table_of
from jaxft.evaluation.items import Item
from jaxft.evaluation.metrics import REWARDS, Metric, metrics_of
from jaxft.evaluation.reading import read_items
from jaxft.evaluation.report import as_object, comparison_lines, table_lines
from jaxft.evaluation.tasks import run_tasks
from jaxft.inference.asked import Before
from jaxft.inference.opening import Words, as_chat, open_model, open_words
from jaxft.objectives.graders import read_graders
from jaxft.runtime.storage import place

DEFAULT = ("loss", "exact")
SHOWN = 3  # items that are named, of those that lack something


@dataclasses.dataclass(frozen=True)
class System:
    """A model with or without an adapter.

    Attributes:
        name: what it is called in what is printed and written.
        adapter: "" for none.
        words: how it is spoken to.
        chat: whether texts are asked as a user's messages.
    """

    name: str
    adapter: str
    words: Words
    chat: bool


def main(
    model: str = "",
    *,
    adapters: Sequence[str] = (),
    base: bool = False,
    data: str = "",
    metrics: str = "",
    grader: str = "",
    normalize: str = "spaces",
    cluster: str = "",
    fields: Sequence[str] = (),
    output: str = "",
    as_json: bool = False,
    compare: Sequence[str] = (),
    tasks: str = "",
    limit: int | None = None,
    training: str = "",
    untouched: str = "",
    chat: bool | None = None,
    system: str = "",
    tokenizer: str = "",
    chat_template: str = "",
    date: str = "",
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
    dtype: str = "float32",
    before: Callable[[Tokenizer], Before] | None = None,
) -> None:
    """Prints the figures of a model, an adapter or several on held-out rows, and how they differ.

    Args:
        model: a Hugging Face folder, or "tiny".
        adapters: PEFT folders, each a system of its own.
        base: the model without an adapter is a system too, the first.
        data: the rows.
        metrics: names with commas between; "": loss and exact, or the grader's alone.
        grader: a JSON file of graders; "" for none.
        normalize: as of `jaxft.evaluate`.
        cluster: likewise.
        fields: "KEY=NAME" each.
        output: a new file for every item's scores; "" for none.
        as_json: print one object instead of lines.
        compare: files that `output` made: they are compared, and no model is read.
        tasks: names of lm-eval's tasks, or YAML files, with commas between, instead of `data`.
        limit: documents of each task; None for all.
        training: rows among which the items are looked for; "" for none.
        untouched: rows that were not trained on; "" for none.
        chat: whether a text is a user's message; None: where the model was trained on chats.
        system: a system message for the conversations that have none.
        tokenizer: as of `open_words`, like the next two.
        chat_template: "" for the adapter's or the tokenizer's.
        date: "" for the present moment.
        max_new_tokens: the most tokens of an answer.
        batch_size: rows at once.
        dtype: of weights and computation.
        before: for the model's tokenizer, what puts passages before the questions; None for nothing.

    Raises:
        UserError: what cannot be read, or does not fit together.
    """
    if compare:
        _compare_files(compare, as_json)
        return
    _check_flags(model, data, tasks, adapters, untouched, output)
    if tasks and before is not None:
        raise UserError("evaluate: --retrieve goes with --data: a task writes its own prompts")
    graders = read_graders(grader) if grader else ()
    table = table_of(split(metrics) or ([] if graders else DEFAULT), normalize, graders)
    if not adapters and (beside := [one.name for one in table if one.needs == REWARDS]):
        raise UserError(f"{beside[0]} is an adapter's beside its base: give --adapter DIR")
    options = {"tokenizer": tokenizer, "chat_template": chat_template, "date": date}
    systems = list(_systems(model, adapters, base or bool(untouched), chat, system, options))
    if tasks:
        on_tasks = _on_tasks(model, systems, split(tasks), dtype, batch_size, system, limit)
        _tell(output, on_tasks, {}, [], cluster, as_json)
        return
    renamed = _fields_of(fields)
    as_messages = systems[0].words.tokenizer.chat_template is not None
    items = read_items(data, as_messages=as_messages, cluster=cluster, fields=renamed)
    check_needs(table, items, graders)
    aside = read_items(untouched, as_messages=as_messages) if untouched else []
    seen = found_in_training(items, training, as_messages, renamed) if training else []
    settings: dict[str, Any] = {
        "system": system,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "graders": graders,
        "before": before,
    }
    results, forgot = _evaluated(model, systems, items, aside, table, dtype, settings)
    _tell(output, results, forgot, seen, cluster, as_json)


def _check_flags(
    model: str, data: str, tasks: str, adapters: Sequence[str], untouched: str, output: str
) -> None:
    if not model:
        raise UserError("evaluate: --model is needed, or --compare A.jsonl B.jsonl")
    if bool(data) == bool(tasks):
        both = "take one of them" if data else "--data is needed, or --tasks"
        raise UserError(f"evaluate: --data and --tasks: {both}")
    if untouched and not adapters:
        raise UserError("--untouched compares adapters with their base: give --adapter DIR")
    if output and place(output).exists():
        raise UserError(f"--output {output}: there is such a file already; name a new one")


def split(names: str) -> list[str]:
    """The names in a text with commas between.

    >>> split("loss, exact,")
    ['loss', 'exact']
    """
    return [name.strip() for name in names.split(",") if name.strip()]


def _on_tasks(
    model: str,
    systems: Sequence[System],
    names: Sequence[str],
    dtype: str,
    batch_size: int,
    system: str,
    limit: int | None,
) -> dict[str, Result]:
    """What lm-eval's tasks say of every system."""
    found = {}
    for one in systems:
        network, params = open_model(model, one.adapter, dtype)
        found[one.name] = run_tasks(
            network,
            params,
            one.words.tokenizer,
            names,
            batch_size=batch_size,
            chat=one.chat,
            system=system,
            limit=limit,
        )
    return found


def _systems(
    model: str,
    adapters: Sequence[str],
    base: bool,
    chat: bool | None,
    system: str,
    options: Mapping[str, str],
) -> Iterator[System]:
    """The systems in the order in which they are compared: the base first."""
    if len(set(adapters)) < len(adapters):
        raise UserError("--adapter: the same folder is given twice")
    for adapter in [*([""] if base or not adapters else []), *adapters]:
        words = open_words(model, adapter, **options)
        name = adapter or ("base" if adapters else model)
        yield System(name, adapter, words, as_chat(words, chat, system))


def _fields_of(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        key, equals, name = pair.partition("=")
        if not (key and equals and name):
            raise UserError(f"--field takes KEY=NAME, as prompt=question, not {pair!r}")
        found[key] = name
    return found


def _evaluated(
    model: str,
    systems: Sequence[System],
    items: Sequence[Item],
    aside: Sequence[Item],
    table: Sequence[Metric],
    dtype: str,
    settings: Mapping[str, Any],
) -> tuple[dict[str, Result], dict[str, Result]]:
    """What was found of every system on the items and on the rows aside; one of them is in memory at a time."""
    results, forgot = {}, {}
    for one in systems:
        network, params = open_model(model, one.adapter, dtype)
        asked: dict[str, Any] = {**settings, "chat": one.chat, "progress": True}
        words = one.words.tokenizer
        results[one.name] = evaluate_items(network, params, items, table, words, **asked)
        if aside:
            loss = metrics_of(["loss"])
            forgot[one.name] = evaluate_items(
                network, params, aside, loss, words, **{**asked, "graders": (), "before": None}
            )
        del network, params
    return results, forgot


def _write(output: str, results: Mapping[str, Result]) -> None:
    lines = [
        json.dumps({"system": name, **record}, ensure_ascii=False)
        for name, result in results.items()
        for record in result.records
    ]
    place(output).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tell(
    output: str,
    results: Mapping[str, Result],
    forgot: Mapping[str, Result],
    seen: Sequence[Found],
    cluster: str,
    as_json: bool,
) -> None:
    """Writes the items and prints figures, differences and what is to be known."""
    if output:
        _write(output, results)
    figures = {name: result.metrics for name, result in results.items()}
    records = next(iter(results.values())).records
    differences = _differences({name: result.records for name, result in results.items()})
    changes = _differences({name: result.records for name, result in forgot.items()})
    unscored = {name: result.unscored for name, result in results.items() if result.unscored}
    if as_json:
        said: dict[str, Any] = as_object(figures)
        said |= {"items": len(records), "cluster": cluster, "unscored": unscored}
        if refused := _refused(results):
            said["refused"] = refused
        if differences:
            said["comparisons"] = _as_objects(differences)
        if forgot:
            told = as_object({name: result.metrics for name, result in forgot.items()})
            said["untouched"] = {**told, "comparisons": _as_objects(changes)}
        if seen:
            said["in_training"] = [dataclasses.asdict(one) for one in seen]
        print(json.dumps(said, ensure_ascii=False))
        return
    together = f"clustered by {cluster!r}" if cluster else "each by itself"
    print(*table_lines(figures), sep="\n")
    groups = len({record["cluster"] for record in records})
    drawn = f"{resamples_of(groups):,} resamples of {counted(len(records), 'item')}"
    print(f"(95 % intervals from {drawn}, {together})")
    for name, count in _refused(results).items():
        stand = worded(count, "was", "were")
        print(
            f"{name}: {count:,} of {counted(len(records), 'question')} {stand} refused: no passage answers it"
        )
    for (first, second), found in differences.items():
        print(*comparison_lines(first, second, found), sep="\n")
    if forgot:
        print("on rows that were not trained on:")
        print(*table_lines({name: result.metrics for name, result in forgot.items()}), sep="\n")
        for (first, second), found in changes.items():
            print(*comparison_lines(first, second, found), sep="\n")
    _tell_notes(unscored, seen, len(records))


def _refused(results: Mapping[str, Result]) -> dict[str, int]:
    """How many questions each system refused; only those that refused any."""
    counts = {
        name: sum(record.get("refused", False) for record in result.records)
        for name, result in results.items()
    }
    return {name: count for name, count in counts.items() if count}


def _tell_notes(
    unscored: Mapping[str, Mapping[str, str]], seen: Sequence[Found], items: int
) -> None:
    for name, reasons in unscored.items():
        first = "; ".join(f"{origin}: {why}" for origin, why in list(reasons.items())[:SHOWN])
        print(f"{name}: {counted(len(reasons), 'item')} without a score: {first}")
    for kind in dict.fromkeys(one.kind for one in seen):
        same = [one for one in seen if one.kind == kind]
        first = "; ".join(f"{one.origin} as {one.training}" for one in same[:SHOWN])
        stand = worded(len(same), "stands", "stand")
        print(
            f"{len(same):,} of {counted(items, 'item')} {stand} in the training data ({kind}): {first}"
        )


def _differences(records: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """Every system beside those before it, where anything is known of single items."""
    return {
        (first, second): compare(records[first], records[second], (first, second))
        for first, second in itertools.combinations(records, 2)
        if records[first] and records[second]
    }


def _as_objects(differences: Mapping[tuple[str, str], Any]) -> list[dict[str, Any]]:
    return [
        {"first": first, "second": second, "metric": name, **dataclasses.asdict(found)}
        for (first, second), each in differences.items()
        for name, found in each.items()
    ]


def _compare_files(paths: Sequence[str], as_json: bool) -> None:
    """Prints the figures of what was written of some systems, and how they differ."""
    systems: dict[str, Any] = {}
    for path in paths:
        for name, records in read_results(path).items():
            systems[f"{path} ({name})" if len(paths) > 1 else name] = records
    if len(systems) < 2:
        raise UserError(f"--compare {paths[0]}: holds one system; name a second file")
    figures = {name: figures_in(records) for name, records in systems.items()}
    differences = _differences(systems)
    if as_json:
        told = {**as_object(figures), "comparisons": _as_objects(differences)}
        print(json.dumps(told, ensure_ascii=False))
        return
    print(*table_lines(figures), sep="\n")
    for (first, second), found in differences.items():
        print(*comparison_lines(first, second, found), sep="\n")
    sys.stdout.flush()
