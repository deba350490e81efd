"""lm-eval's tasks, and files in their YAML form: `jaxft evaluate --tasks`. Needs the extra `lm-eval`."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.data.tokenizer import Tokenizer
from jaxft.errors import UserError, nearest
from jaxft.evaluation.confidence import Figure, figure
from jaxft.evaluation.evaluate import Result
from jaxft.evaluation.metrics import mean
from jaxft.models import Transformer

ENDINGS = (".yaml", ".yml")
NORMAL = 1.959964  # standard errors in half of a 95 % interval


def run_tasks(
    model: Transformer,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    names: Sequence[str],
    *,
    batch_size: int,
    chat: bool = False,
    system: str = "",
    limit: int | None = None,
) -> Result:
    """A model's figures on tasks, as lm-eval computes them; the metric of a task is called TASK/METRIC.

    A metric that is a mean over documents has our interval, and each document's score is recorded. Of others (a
    perplexity, a corpus's BLEU) the interval is lm-eval's standard error times 1.96, where it gives one.

    Args:
        model: the decoder.
        params: its tree.
        tokenizer: the model's.
        names: of lm-eval's own tasks and groups, or YAML files.
        batch_size: sequences at once.
        chat: ask through the chat template.
        system: the system's message.
        limit: documents of each task; None for all.

    Raises:
        UserError: lm-eval is not installed, or a task is unknown or cannot be loaded.
    """
    from jaxft.evaluation import LanguageModel

    with _quiet():
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        manager = TaskManager()
        specs = [_spec(name, manager) for name in names]
        try:
            found = simple_evaluate(
                model=LanguageModel(model, params, tokenizer, batch_size),
                tasks=specs,
                task_manager=manager,
                apply_chat_template=chat,
                system_instruction=system or None,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        except UserError:
            raise
        except Exception as error:  # a task's own code, data and templates raise what they like
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"--tasks {','.join(names)}: lm-eval cannot run it: {type(error).__name__}: {reason}"
            ) from error
    return _summarized(found)


def _spec(name: str, manager: Any) -> str:
    """The task as lm-eval takes it; UserError if there is none."""
    if name.endswith(ENDINGS):
        if not Path(name).is_file():
            raise UserError(f"--tasks {name}: there is no such file")
        return str(Path(name).resolve())
    if name not in manager.all_tasks:
        raise UserError(
            f"--tasks {name}: lm-eval has no task of that name, and it is no .yaml file"
            f"{nearest(name, manager.all_tasks)}"
        )
    return name


@contextlib.contextmanager
def _quiet() -> Any:
    """lm-eval's own bars and prints on stderr, so that stdout holds what was asked for; its warnings alone."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)


def _summarized(found: Mapping[str, Any]) -> Result:
    figures: dict[str, Figure] = {}
    records: dict[str, dict[str, Any]] = {}
    for task, results in found["results"].items():
        samples = found["samples"].get(task, [])
        for key, value in results.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = f"{task}/{metric}" + ("" if chosen == "none" else f"/{chosen}")
            of_filter = [one for one in samples if one.get("filter", "none") == chosen]
            scores = [one.get(metric) for one in of_filter]
            if scores and all(isinstance(score, int | float) for score in scores):
                rows = np.asarray([(float(score), 1.0) for score in scores])
                items = [f"{task}:{one['doc_id']}" for one in of_filter]
                whole = float(mean(rows.sum(axis=0)))
                if abs(whole - value) <= 1e-9 * max(abs(whole), 1.0):
                    figures[name] = figure(rows, items, mean, most=1.0)
                    _record(records, name, items, of_filter, rows)
                    continue
            figures[name] = _by_error(
                value, results.get(f"{metric}_stderr,{chosen}"), len(of_filter)
            )
    return Result(figures, list(records.values()), {})


def _by_error(value: float, error: Any, n: int) -> Figure:
    """A figure that is no mean over documents, with lm-eval's standard error if it has one."""
    if not isinstance(error, int | float):
        return Figure(float(value), None, None, n, n)
    return Figure(float(value), value - NORMAL * error, value + NORMAL * error, n, n)


def _record(
    records: dict[str, dict[str, Any]],
    name: str,
    items: Sequence[str],
    samples: Sequence[Mapping[str, Any]],
    rows: np.ndarray,
) -> None:
    """Adds each document's score to its record."""
    for name_of_item, sample, row in zip(items, samples, rows, strict=True):
        record = records.setdefault(
            name_of_item,
            {
                "origin": name_of_item,
                "cluster": name_of_item,
                "prompt": [name_of_item, sample.get("doc_hash", "")],
                "references": [str(sample.get("target", ""))],
                "answer": _answer(sample),
                "tokens": {},
                "scores": {},
                "statistics": {},
            },
        )
        record["scores"][name] = float(row[0])
        record["statistics"][name] = row.tolist()


def _answer(sample: Mapping[str, Any]) -> Any:
    """What was generated; of likelihoods nothing was."""
    said = sample.get("filtered_resps") or [None]
    return said[0] if isinstance(said[0], str) else None
