"""`jaxft report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

HELP = "one page of runs, or of a comparison: curves, samples, drawings, in one file"
EPILOG = """\
The page opens from disk, needs no network, and holds all that it shows:

  jaxft report runs/lora runs/vera --output page.html
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; may be gs://...")
    parser.add_argument("--output", required=True, metavar="PAGE.html", help="a file that is new")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")


def run(runs: Sequence[str], output: str, force: bool) -> None:
    """Runs the verb."""
    from jaxft.runs.report import write_report
    from jaxft.runtime import storage

    for line in write_report(storage.place(output), runs, force=force):
        print(line, file=sys.stderr)
    print(output)
