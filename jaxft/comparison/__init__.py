"""Which lever fits: a prompt, examples in it, retrieval, tuned weights; measured on one's own data, with a verdict.

`jaxft.compare(config, workdir)` writes RUN/comparison.json, which holds all that is known; RUN/ledger.jsonl, a line
for each finished piece, from which it is made again; and RUN/repeat.json, from which the same figures come again:

    version       1
    model         `config.model`
    device        what it was measured on, as a text
    done          false while levers are still to come
    metric        {name, lower: whether less is better, most: the highest score there is, or null,
                  worth: the smallest gain that counts}
    rows          {train, tuning, test: how many rows and questions, overlap: ["file:line", ...] of the test rows that
                  stand in the training data too and were left out}
    steps         updates of a whole tuning run, the same for every lever
    batch_size    sequences of an update
    budget        seconds, or null for none
    seconds       that were spent
    price_per_hour
    confidence    of the differences' intervals, all of them together: 0.95
    levers        from the simplest to the least simple, those that were left out at their places:
        name         as `config.levers` takes it
        title        a few words for a reader
        kind         prompt | retrieval | adapter | weights
        signal       what it learns from: none | examples | preferences | rewards
        recipe       what it is tuned with, as "configs/sft.py:lora"; "" for what trains nothing
        reason       why it was left out; "" where it was measured. What follows is there of measured levers alone.
        score        {value, low, high, n}: the metric on the test rows, over all seeds, with its 95 % interval
        difference   {value, low, high, n, verdict: better | worse | cannot tell, more: rows that would tell, or null}
                     to the simplest lever, question by question, its interval widened for the number of levers; null
                     of the simplest lever itself
        untouched    {value, low, high, n}: how the loss a token changed on text that nothing was trained on; above 0:
                     it forgets. Null where no weight changes: nothing can.
        parameters   trained ones; 0 where none are
        bytes        of what is kept besides the model: adapter, index, examples, or the whole tuned model
        memory       bytes that the device needs for an update, by its compiler; of runs that train together, the share
                     of one beside the base. Null where nothing is trained
        planned      the same for `config.topology`, by `jaxft plan`; null without one
        tokens_per_second   in tuning; null where nothing is trained
        seconds      of one whole tuning run; of runs that train together, with the share of one in their updates; 0
                     where nothing is trained
        search_seconds   of all runs that chose its setting
        price        of one whole tuning run, by `config.price_per_hour`; null without one
        added_tokens, added_seconds   a request costs, more than a plain prompt does
        facts        what is to be done when the facts change
        changed      {before, value, low, high, n}: the metric once the facts of the documents have changed places, with
                     nothing tuned anew, on the questions that they answer; before: on the same with the old facts. Null
                     without documents, or where no two of their facts are asked for.
        searched     [{setting: {rate: 3e-4} or {examples: 2}, value: of the held-out loss or score, name: of it,
                     part: of a whole run, 0.25}, ...]: all that was tried on the tuning rows; value null: it failed
        setting      the one that was chosen
        seeds        of the measured runs
        scores       the score of each of them
        runs         folders in RUN with metrics.jsonl, of each seed; [] where nothing is trained
        samples      [{prompt, answer, reference}, ...]: the same questions for every lever; a prompt is a text, or a
                     list of messages, and reference null where there is none
    verdict
        sentences    two
        told         chosen | nothing helps | cannot tell
        chosen       name of the lever, or null where it cannot be told
        next         name of the lever that the second sentence is about, or null
        more         about how many more test rows would tell, or null
        steps        [text, ...]: the reasoning, as `--explain` prints it
"""

from __future__ import annotations
