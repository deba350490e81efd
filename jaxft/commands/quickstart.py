"""`jaxft quickstart`."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "fine-tune the embedded model: a look in minutes"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument(
        "--workdir", default="runs/quickstart", metavar="RUN", help="default: runs/quickstart"
    )


def run(**flags: Any) -> None:
    """Runs the verb."""
    from jaxft.quickstart import quickstart

    quickstart(**flags)
