"""The comparison of routes from text to tokens."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from llmlib import bench_data
from llmlib.tests.hub_server import write_corpus


def test_all_routes_make_the_same_tokens_and_are_compared(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "hub", n_shards=2, n_documents=100)
    table = bench_data.measure(str(corpus), tokenizer="bpe", n_repeats=1)
    assert table.route.tolist() == list(bench_data.ROUTES)
    assert table.n_tokens.nunique() == 1
    assert (table[["mb_per_s", "peak_memory_gib"]] > 0).all(axis=None)
    assert table.times_usual_route[1] == table.share_of_bare_cores[0] == 1


def test_routes_that_disagree_are_refused() -> None:
    rows = [{"route": "a", "n_tokens": 1}, {"route": "b", "n_tokens": 2}]
    with pytest.raises(RuntimeError, match=r"disagree on the tokens: \[1, 2\]"):
        bench_data._table(pd.DataFrame(rows), mb=1.0)
