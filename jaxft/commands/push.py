"""`jaxft push`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "upload an adapter or a model to the Hugging Face hub"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument(
        "--folder", required=True, type=Path, metavar="DIR", help="RUN/adapter, RUN/model"
    )
    parser.add_argument(
        "--repository",
        required=True,
        metavar="OWNER/NAME",
        help="made where there is none; HF_TOKEN, or hf auth login, says who you are",
    )
    parser.add_argument("--public", action="store_true", help="a new one is for everybody to see")
    parser.add_argument("--overwrite", action="store_true", help="replace files that differ")


def run(folder: Path, repository: str, **flags: Any) -> None:
    """Runs the verb."""
    from jaxft.formats.manifest import check_manifest
    from jaxft.runtime.hub import push

    check_manifest(folder)
    print(push(folder, repository, **flags))
