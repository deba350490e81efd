"""Scores of answers beside references, by the packages that define them: overlap.json.

    pip install rouge-score==0.1.2 sacrebleu==2.6.0 future
    git clone https://github.com/tuetschek/e2e-metrics
    python tests/golden/make_overlap.py e2e-metrics

ROUGE is rouge-score's, NIST that of E2E's metrics/pymteval.py, CIDEr that of its copy of COCO's script (on words that
are cut already: its own tokenizer is a Java program), BLEU and chrF are sacrebleu's.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "jaxft" / "assets" / "quickstart" / "heldout.jsonl"
KINDS = ("rouge1", "rouge2", "rougeL")


def texts() -> tuple[list[str], list[list[str]]]:
    """Answers that are the references with words left out, doubled and swapped; one to three references each."""
    draw = random.Random(0)
    rows = [json.loads(line)["completion"].strip() for line in SOURCE.read_text().splitlines()]
    answers, references = [], []
    for number, right in enumerate(rows[:40]):
        references.append([right, *draw.sample(rows, number % 3)])
        words = [word for word in right.split() for _ in range(draw.choice((0, 1, 1, 1, 1, 2)))]
        if number % 4 == 0:
            draw.shuffle(words)
        answers.append(" ".join(words))
    answers[3] = ""
    answers[5] = 'Nothing of it, in 3.5 words - or "four"!'
    return answers, references


def main() -> None:
    """Writes the file."""
    sys.path.insert(0, sys.argv[1])
    from metrics.pymteval import NISTScore
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    answers, references = texts()
    scorer = RougeScorer(KINDS)
    found: dict[str, object] = {"answers": answers, "references": references}
    for kind in KINDS:
        found[kind] = [
            scorer.score_multi(each, answer)[kind].fmeasure
            for answer, each in zip(answers, references, strict=True)
        ]
    nist, cider, cut = NISTScore(), CiderScorer(), Tokenizer13a()
    long = [place for place, answer in enumerate(answers) if len(answer.split()) >= 5]
    for place in long:  # of shorter ones pymteval counts a negative number of n-grams
        nist.append(answers[place], references[place])
    for answer, each in zip(answers, references, strict=True):
        cider += (cut(answer), [cut(one) for one in each])
    found["nist"] = {"items": long, "score": nist.score()}
    found["cider"] = list(map(float, cider.compute_score()[1]))
    streams = [
        [each[place] if place < len(each) else None for each in references] for place in range(3)
    ]
    for name, metric in (
        ("bleu", sacrebleu.BLEU()),
        ("bleu_lower", sacrebleu.BLEU(lowercase=True)),
        ("chrf", sacrebleu.CHRF()),
    ):
        found[name] = metric.corpus_score(answers, streams).score
    (HERE / "overlap.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
