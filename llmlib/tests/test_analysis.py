import math

import numpy as np
import pandas as pd
import pytest

from llmlib import analysis


def curve_of(loss, tokens):
    return pd.DataFrame({"kind": "step", "tokens": tokens, "loss": loss})


def test_smoothing_keeps_a_constant_and_halves_the_noise():
    tokens = pd.Series(np.arange(1, 401) * 10.0)
    noise = pd.Series(np.random.default_rng(0).normal(3.0, 1.0, 400))
    assert analysis.smooth(pd.Series(np.full(400, 3.0)), tokens, 200).tolist() == pytest.approx(
        [3.0] * 400
    )
    smoothed = analysis.smooth(noise, tokens, 200)
    assert smoothed.iloc[100:].std() < 0.5 * noise.std()
    assert smoothed.iloc[0] == noise.iloc[0]  # unbiased at the start


def test_slope_is_recovered_with_its_error():
    rng = np.random.default_rng(1)
    tokens = np.arange(1, 1001) * 100.0
    slopes = []
    for _ in range(200):
        fit = analysis.fit_slope(
            curve_of(5 - 0.2 * np.log(tokens) + rng.normal(0, 0.1, 1000), tokens)
        )
        slopes.append((fit["slope"], fit["standard_error"]))
    values, errors = np.array(slopes).T
    assert values.mean() == pytest.approx(-0.2, abs=0.005)
    assert values.std() == pytest.approx(errors.mean(), rel=0.25)


def test_too_short_a_run_has_no_slope():
    assert math.isnan(analysis.fit_slope(curve_of(np.ones(10), np.arange(10.0)))["slope"])


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight():
    assert analysis.bits_per_byte(math.log(256), tokens_per_byte=1.0) == pytest.approx(8.0)


def test_domains_add_up_over_shards():
    def shard(docs):
        return {"domains": {"a": {"documents": docs, "bytes": 40, "tokens": 10}}}

    split = [shard(1), shard(2), {"domains": {"b": {"documents": 1, "bytes": 10, "tokens": 5}}}]
    table = analysis.domain_table(split).set_index("domain")
    assert table.documents.to_dict() == {"a": 3, "b": 1}
    assert table.share.sum() == pytest.approx(1.0)
    assert analysis.tokens_per_byte(split) == pytest.approx(25 / 90)
