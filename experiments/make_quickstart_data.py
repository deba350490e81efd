"""Makes the quickstart's data: small records, and the word problem that each becomes.

    python experiments/make_quickstart_data.py jaxft/assets/quickstart

Writes train.jsonl and heldout.jsonl, rows of `prompt` and `completion`. All words stand in this
file; the data are under the project's licence (Apache-2.0). A problem is a function of its record,
so an answer is right or wrong. No name and thing of a held-out row meet in a training row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

TRAIN, HELD_OUT = 600, 60
NAMES = """
Adam Alice Amy Andrew Anna Ben Carl Cindy Daniel David Emily Emma Eric Frank George Grace Henry Jack
James Jane Jason Jerry Jessica Jill John Julia Karen Kate Kevin Laura Lily Lisa Lucy Maria Mark
Martin Mary Michael Mike Nancy Oliver Paul Peter Rachel Robert Sam Sarah Susan Tim Tina Tom
"""
# The things that a record may be about, its fields with the ranges of numbers, and the problem.
KINDS = (
    (
        "apples pencils books shirts cupcakes balloons tickets flowers oranges candles",
        {"item": "{thing}", "count": (2, 40), "price": (2, 30, " dollars")},
        "{name} buys {count} {thing} for {price} dollars each. How much does {name} pay?",
    ),
    (
        "cookies marbles stickers candies cards pies toys coins peaches pens",
        {"item": "{thing}", "total": (12, 99), "friends": (2, 9)},
        "{name} shares {total} {thing} among {friends} friends. How many does each friend get?",
    ),
    (
        "bike computer camera phone dress guitar car ring watch table",
        {"goal": "{thing}", "weekly": (5, 60, " dollars"), "weeks": (2, 20)},
        "{name} saves {weekly} dollars a week for a {thing}. How much is that in {weeks} weeks?",
    ),
    (
        "school beach park library store zoo museum office lake farm",
        {"place": "{thing}", "speed": (5, 70, " miles per hour"), "hours": (2, 9)},
        "{name} travels to the {thing} at {speed} miles per hour for {hours} hours. How far is it?",
    ),
    (
        "bread soup cake pizza salad juice tea rice pasta coffee",
        {"food": "{thing}", "minutes": (3, 60), "times": (2, 12)},
        "{name} makes {thing} {times} times. Each takes {minutes} minutes. How long is it in all?",
    ),
)


def example(kind: int, name: str, thing: str, draw: random.Random) -> dict[str, str]:
    """A record with numbers drawn for it, its fields in any order behind the name, and its problem.

    >>> example(0, "Anna", "apples", random.Random(0))["completion"]
    ' Anna buys 26 apples for 26 dollars each. How much does Anna pay?'
    """
    _, ranges, problem = KINDS[kind]
    values, fields = {"name": name, "thing": thing}, []
    for key, bounds in ranges.items():
        if isinstance(bounds, str):
            fields.append(f"{key}: {thing}")
        else:
            values[key] = str(draw.randint(*bounds[:2]))
            fields.append(f"{key}: {values[key]}{''.join(bounds[2:])}")
    draw.shuffle(fields)
    record = " | ".join([f"name: {name}", *fields])
    return {"prompt": f"{record} ->", "completion": " " + problem.format(**values)}


def examples(pairs: list[tuple[str, int, str]], draw: random.Random) -> Iterator[dict[str, str]]:
    """One example for each (name, kind, thing)."""
    for name, kind, thing in pairs:
        yield example(kind, name, thing, draw)


def main() -> None:
    """Writes both files into the folder given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    things = [(kind, thing) for kind, row in enumerate(KINDS) for thing in row[0].split()]
    pairs = [(name, *thing) for name, thing in itertools.product(NAMES.split(), things)]
    draw.shuffle(pairs)
    parts = {"train": pairs[:TRAIN], "heldout": pairs[TRAIN : TRAIN + HELD_OUT]}
    for name, part in parts.items():
        lines = [json.dumps(row) + "\n" for row in examples(part, draw)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{len(lines)} examples: {folder / name}.jsonl")


if __name__ == "__main__":
    main()
