import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from llmlib import plots
from llmlib.surface import Optima

DOMAINS = pd.DataFrame(
    {"domain": ["a", "b"], "tokens": [9, 1], "share": [0.9, 0.1], "bytes_per_token": [3.0, 4.0]}
)
CURVE = pd.DataFrame(
    {
        "kind": ["step", "eval", "step"],
        "step": [1, 1, 2],
        "tokens": [10.0, 10.0, 20.0],
        "seconds": [1.0, 1.5, 2.0],
        "flops": [1e3, 1e3, 2e3],
        "loss": [3.0, np.nan, 2.5],
        "val_loss": [np.nan, 3.1, np.nan],
        "smoothed": [3.0, np.nan, 2.8],
    }
)
SPEEDS = pd.DataFrame(
    {
        "name": ["ours", "plain"],
        "claim": ["", "1.15x"],
        "n_layer": [1, 2],
        "d_model": [64, 32],
        "n_params": [1e6, 1.1e6],
        "tokens_per_s": [10.0, 5.0],
        "tokens_per_s_low": [9.0, 4.0],
        "tokens_per_s_high": [11.0, 6.0],
        "flops_per_s": [100.0, 50.0],
        "speed_up": [1.0, 2.0],
        "speed_up_low": [1.0, 1.8],
        "speed_up_high": [1.0, 2.2],
        "memory_gib": [1.0, 1.5],
    }
)
FITS = pd.DataFrame(
    [
        (q, m, 2, 0.5, 0.1)
        for q in ("n_params", "micro_batch")
        for m in ("tokens_per_s", "memory_gib")
    ],
    columns=["quantity", "measured", "n", "exponent", "standard_error"],
)
SETTINGS = pd.DataFrame(
    {
        "group": ["schedules", "claims"],
        "setting": ["wsd", "gpt2"],
        "optimizer": ["adamw", "muon"],
        "recipe": ["winner2024", "best"],
        "seed": [0, 0],
        "lr": [1e-3, 1e-2],
        "loss": [3.0, 2.9],
        "difference": [-0.1, 0.2],
        "share": [1.0, 0.3],
        "bound": [False, True],
    }
)
SEEDS = pd.concat(
    CURVE.dropna(subset="val_loss").assign(recipe=recipe, seed=seed)
    for recipe in ("winner2024", "best")
    for seed in (0, 1)
)
VERDICT = pd.DataFrame(
    {
        "n_params": [1e6, 2e6, 4e6],
        "loss": [3.02, 3.0, 3.1],
        "loss_low": [2.9, 2.9, 2.9],
        "loss_high": [3.2, 3.2, 3.2],
        "in_basin": [False, True, False],
        "is_extrapolated": [False, False, True],
    }
)
POINTS = pd.DataFrame(
    {
        "flops": [1e9, 1e9, 1e9],
        "n_params": [1e6, 2e6, 4e6],
        "n_tokens": [4e6, 2e6, 1e6],
        "loss": [3.1, 3.0, 3.1],
        "predicted": [3.0, 3.0, 3.2],
    }
)
VERTEX = POINTS[1:2].assign(curvature=0.1, is_extrapolated=False)
DOMAIN_LOSSES = pd.DataFrame(
    {
        "run": ["one", "one", "two", "two"],
        "domain": ["a", "b", "a", "b"],
        "n_tokens": [9, 1, 9, 1],
        "bits_per_byte": [1.2, 1.0, 1.3, 1.1],
    }
)
SIZES = pd.DataFrame({"fit": "f", "n_params": [1e6, 1e7, 1e8], "loss": [3.2, 3.0, 3.1]})
FIGURES = {
    "domain_mix": lambda: plots.domain_mix(DOMAINS),
    "document_lengths": lambda: plots.document_lengths(pd.DataFrame({"tokens": [5, 80, 900]}), 64),
    "speed_ups": lambda: plots.speed_ups(SPEEDS),
    "waterfall": lambda: plots.waterfall(SPEEDS),
    "speed_by_shape": lambda: plots.speed_by_shape(SPEEDS, 200.0),
    "time_breakdown": lambda: plots.time_breakdown(
        pd.DataFrame({"kind": ["matmul", "data"], "seconds": [3.0, 1.0], "share": [0.75, 0.25]})
    ),
    "growth": lambda: plots.growth(
        {"n_params": SPEEDS, "micro_batch": SPEEDS.assign(micro_batch=[1, 2])}, FITS
    ),
    "predicted_loss": lambda: plots.predicted_loss(
        SIZES, pd.DataFrame({"name": ["here"], "n_params": [2e7]}), "title"
    ),
    "training_curve": lambda: plots.training_curve(CURVE, pd.Series([3.0, 2.8]), 2.4),
    "budget_bar": lambda: plots.budget_bar(
        pd.DataFrame({"kind": ["training", "compile"], "seconds": [9.0, 1.0]})
    ),
    "compare_curves": lambda: plots.compare_curves({"one": CURVE, "two": CURVE}),
    "domain_bars": lambda: plots.domain_bars(DOMAIN_LOSSES),
    "sizing_verdict": lambda: plots.sizing_verdict(
        VERDICT, VERDICT[["n_params"]][:1].assign(name="20:1"), "1 h"
    ),
    "isoflops": lambda: plots.isoflops(Optima(VERTEX, POINTS, 0.5, np.nan), {"another": VERTEX}),
    "fit_residuals": lambda: plots.fit_residuals(POINTS),
    "lr_sensitivity": lambda: plots.lr_sensitivity(SETTINGS),
    "differences": lambda: plots.differences(SETTINGS, "title"),
    "finalists": lambda: plots.finalists(SEEDS, "title"),
    "time_to_target": lambda: plots.time_to_target(SETTINGS, "title"),
}


def test_every_figure_is_tested_here():
    drawn = {name for name, draw in vars(plots).items() if hasattr(draw, "__wrapped__")}
    assert set(FIGURES) == drawn


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_names_its_quantity_and_the_style_stays_ours(name):
    before = dict(plt.rcParams)
    figure = FIGURES[name]()
    assert dict(plt.rcParams) == before
    assert all(axes.get_xlabel() for axes in figure.axes)
    assert any(axes.get_title(loc="left") for axes in figure.axes)


def texts(figure):
    """Everything a reader can read in a figure."""
    return [text.get_text() for text in figure.findobj(Text)]


def test_figures_of_the_recipe_name_their_winner_and_its_bounds():
    failed = pd.concat([SETTINGS, SETTINGS[:1].assign(loss=np.nan, lr=1.0)])
    figure = plots.lr_sensitivity(failed)
    assert "Lowest loss: muon at a peak rate of 0.01" in texts(figure)
    assert "at most 30%" in texts(FIGURES["time_to_target"]())
    [reference] = [line for line in figure.axes[0].lines if line.get_label() == "adamw"]
    assert len(reference.get_xdata()) == 1  # a failed run has no point


def test_saved_figure_comes_with_its_data(tmp_path):
    plots.save_figure(FIGURES["budget_bar"](), DOMAINS, tmp_path / "figures" / "x")
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["x.csv", "x.png", "x.svg"]
    assert pd.read_csv(tmp_path / "figures" / "x.csv").equals(DOMAINS)


def test_experiments_differ_without_colour():
    looks = {(str(look["linestyle"]), look["marker"]) for look in plots.LOOKS}
    assert len(looks) == len(plots.LOOKS)


@pytest.mark.parametrize(("value", "text"), [(179_983_360, "180M"), (1.5e9, "1.5B"), (950, "950")])
def test_numbers_read_short(value, text):
    assert plots.si(value) == text
