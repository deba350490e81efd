from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxft.errors import UserError
from jaxft.models.frequencies import rope_frequencies

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("rope.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: str(case["scaling"]))
def test_rope_frequencies_equal_transformers(case):
    frequencies, factor = rope_frequencies(
        case["head_dim"], case["theta"], case["scaling"], case["max_length"]
    )
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, case["frequencies"], rtol=1e-6)
    assert factor == pytest.approx(case["attention_factor"], rel=1e-12)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "dynamic", "factor": 2.0}, "'dynamic': known are default, linear, llama3, yarn"),
        ({"rope_type": "lama3"}, "nearest: 'llama3'"),
        ({"rope_type": "llama3", "factor": 2.0}, "'llama3' lacks 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_rope_scaling_that_is_not_known_is_refused(scaling, message):
    with pytest.raises(UserError, match=message):
        rope_frequencies(8, 10000.0, scaling, 64)
