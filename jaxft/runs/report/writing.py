"""From folders to the page's file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxft.errors import UserError
from jaxft.runs.folder import written
from jaxft.runs.report.comparison import is_comparison, read_comparison
from jaxft.runs.report.levers import comparison_page
from jaxft.runs.report.page import page_of
from jaxft.runs.report.reading import Run, read_run
from jaxft.runtime import storage

PAGE = "report.html"  # in a run's folder


def page_of_folders(places: Sequence[str | Path]) -> tuple[str, list[str]]:
    """The page of runs, or of one comparison; and a line for each that is not finished.

    Raises:
        UserError: a folder is neither, or a comparison stands beside others.
    """
    compared = [str(place) for place in places if is_comparison(place)]
    for place in places:
        if str(place) not in compared and (storage.place(place) / "ledger.jsonl").exists():
            raise UserError(f"{place}: a comparison of which no lever is measured yet")
    if not compared:
        runs = [read_run(place) for place in places]
        return page_of(runs), [f"{run.place}: {run.state}" for run in runs if run.state]
    if len(places) > 1:
        raise UserError(f"{compared[0]}: a comparison, which has a page of its own; name it alone")
    found = read_comparison(places[0])
    unfinished = (
        [] if found.done else [f"{found.place}: not finished: levers are still to be measured"]
    )
    return comparison_page(found), unfinished


def write_report(path: Path, places: Sequence[str | Path], *, force: bool = False) -> list[str]:
    """Writes the page of runs, or of one comparison; returns a line for each that is not finished.

    Raises:
        UserError: as of `page_of_folders`; a file stands there and `force` is off, or it cannot be written.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a file for the page: {path / PAGE}")
    if path.exists() and not force:
        raise UserError(f"{path}: there is such a file already; name a new one, or add --force")
    text, unfinished = page_of_folders(places)
    _write(path, text)
    return unfinished


def write_run_page(folder: Path, run: Run) -> Path:
    """Writes the page of a run into a folder, over one that is there; returns its path."""
    path = folder / PAGE
    _write(path, page_of([run]))
    return path


def _write(path: Path, text: str) -> None:
    with written(path):
        storage.make(path.parent)
        storage.write_text(path, text)
