"""Graders: what an answer is worth, by the JSON of OpenAI's reinforcement graders and a few kinds beside it.

    string_check      1 or 0: input eq, ne, like (contains) or ilike (contains, whatever the case) reference
    text_similarity   0 to 1: fuzzy_match, bleu, gleu, meteor, cosine, rouge_1 ... rouge_5, rouge_l
    python            what grade(sample, item) of a source returns
    score_model       the number that a model gives
    multi             a formula over other graders
    math              1 or 0: math-verify reads the same value (not OpenAI's, like those below)
    json_schema       1 or 0: the answer is JSON that a schema allows
    regex             1 or 0: a pattern is found, or finds the reference
    function          what a Python function `module:function` of one's own returns

`read_graders` reads them, `grade` asks them, `rewards_of` makes a table of what they said. A grader is a row of a
table (`kinds`); what it cannot judge is None with the reason, never a mistake of the run.
"""

from jaxft.objectives.graders.kinds import KINDS, Case, Grader, Judged, Outside
from jaxft.objectives.graders.reading import check_items, read_graders
from jaxft.objectives.graders.running import case_of, grade, rewards_of

__all__ = [
    "KINDS",
    "Case",
    "Grader",
    "Judged",
    "Outside",
    "case_of",
    "check_items",
    "grade",
    "read_graders",
    "rewards_of",
]
