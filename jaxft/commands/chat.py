"""`jaxft chat`."""

from __future__ import annotations

import argparse
from typing import Any

from jaxft.commands.flags import add_asked, add_sampling

HELP = "talk to a model: a line in, an answer out"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    add_asked(parser)
    add_sampling(parser)


def run(**flags: Any) -> None:
    """Runs the verb."""
    from jaxft.inference.chat import main

    main(**flags)
