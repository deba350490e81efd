"""Which lever fits: every key of `jaxft compare`, its meaning and its default.

Each key can be set on the command line, as in `--config.levers=prompt,lora,full`. What a tuning run is made of beside
these keys (rank, schedule, ...) stands in its own recipe, and `settings` changes it for every lever.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict


def section(**keys: Any) -> ConfigDict:
    """A group of keys. A dict in it stays a plain one: its keys are the user's."""
    return ConfigDict(keys, convert_dict=False)


def get_config() -> ConfigDict:
    """The whole configuration of a comparison."""
    return ConfigDict(
        {
            "model": "tiny",  # a Hugging Face folder, a name of the hub, or "tiny": the small base embedded in jaxft
            "dtype": "auto",  # as in configs/sft.py, like the next
            "param_dtype": "auto",
            "seed": 42,  # of which rows tune, of the data's order; the measured runs have the seeds after it
            "data": data(),
            "graders": "",  # a JSON file of graders, or the JSON itself; the first one's grade is the metric
            "metric": "auto",  # of `jaxft evaluate`; auto: the grader, else preference_accuracy of pairs, else f1
            "normalize": "spaces",  # how texts are read before exact, contains and f1: none | spaces | lower | squad
            "worth": 0.0,  # the smallest gain that counts; 0: a twentieth of the highest score there can be
            "max_new_tokens": 64,  # of an answer, at most
            "levers": (),  # names, as prompt,lora,full; (): all that the data allow
            "budget": "30m",  # of all: 90s, 30m, 2h; 0: none
            "price_per_hour": 0.0,  # of this machine; 0: not told
            "topology": "",  # plan each lever's memory for it too, as v5e:4x4; "": not
            "memory": "",  # bytes that tuning may need, as 8G: levers that need more are left out; "": any
            "kept": "",  # bytes that may be kept of a lever, as 100k, where thousands are kept; "": any
            "steps": 0,  # updates of a whole tuning run; 0: `epochs`, or as many as the budget has room for
            "epochs": 3.0,  # passes over the training rows, where `steps` is 0, at most
            "batch_size": 8,  # sequences of an update
            "eval_batch_size": 16,  # of evaluation
            "seeds": 3,  # measured runs of a lever that chance has a part in
            "search": search(),
            "settings": {},  # keys of every tuning run's recipe, as {"method.rank": 8, "remat": "full"}
        },
        convert_dict=False,
    )


def data() -> ConfigDict:
    """Where the rows come from."""
    return section(
        train="",  # as `data.train` of configs/sft.py: examples, pairs (chosen and rejected), or prompts to be graded
        eval="",  # the test rows: what is decided upon, and never chosen by
        documents=(),  # for retrieval, as --documents PATH...
        untouched="",  # texts that nothing is trained on, to see what is forgotten; "": some that come with jaxft
        fields={},  # the rows' keys, as in configs/sft.py
        chat="auto",  # whether a prompt that is a text is a user's message: true | false | auto: with a template
        max_length=0,  # tokens of a row; 0: 1024, or the model's
        packing=False,  # as in configs/sft.py
        tuning=0,  # rows of `train` that settings are chosen by; 0: a tenth, from 10 to 200
    )


def search() -> ConfigDict:
    """How each lever's setting is chosen, on the tuning rows."""
    return section(
        rates=4,  # learning rates that are tried at first, around the lever's own
        factor=3.0,  # between two of them
        widen=4,  # rates that are added, at most, one at a time, while the best stands at an edge
        parts=(
            0.25,
            0.5,
        ),  # of a whole run: all rates get the first part, and half as many each part that follows
        examples=(2, 4, 8),  # how many stand in a prompt
        passages=(2, 4),  # how many are put before a question
    )
