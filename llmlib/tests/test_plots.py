import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from llmlib import analysis, plots, style

nan = np.nan
DOMAINS = pd.DataFrame({"domain": ["a", "b"], "tokens": [9, 1], "share": [0.9, 0.1]})
DOMAINS["bytes_per_token"] = [3.0, 4.0]
CURVE = pd.DataFrame(
    [
        ["step", 10.0, 1.0, 1e3, 3.0, nan, 3.0, 1e-3, 1.0],
        ["eval", 10.0, 1.5, 1e3, nan, 3.1, nan, nan, nan],
        ["step", 20.0, 2.0, 2e3, 2.5, nan, 2.8, 1e-4, 0.5],
    ],
    columns=["kind", *analysis.AXES, "loss", "val_loss", "smoothed", "lr", "grad_norm"],
)
SPEEDS = pd.DataFrame({"name": ["ours", "plain"], "claim": [nan, 1.15], "n_params": [1e6, 1.1e6]})
for quantity, values in {"tokens_per_s": [10.0, 5.0], "speed_up": [1.0, 2.0]}.items():
    SPEEDS[quantity] = SPEEDS[f"{quantity}_low"] = SPEEDS[f"{quantity}_high"] = values
POINTS = pd.DataFrame({"n_params": [1e6, 1e6, 4e6, 4e6], "n_tokens": [1e6, 2e6, 1e6, 2e6]})
POINTS = POINTS.assign(seconds=[2.0, 4.0] * 2, loss=[3.1, 3.0, 3.2, 3.0], predicted=3.1)
OPTIMA = pd.DataFrame({"seconds": [2.0, 4.0], "n_params": [2e6, nan], "loss": [3.0, nan]})
for quantity in ("n_params", "loss"):
    OPTIMA[f"{quantity}_low"] = OPTIMA[f"{quantity}_high"] = OPTIMA[quantity]
OPTIMA["curvature"] = 0.1
DOMAIN_LOSSES = pd.DataFrame({"run": ["one", "one", "two", "two"], "domain": ["a", "b"] * 2})
for end in ("", "_low", "_high"):
    DOMAIN_LOSSES[f"bits_per_byte{end}"] = [1.2, 1.0, 1.3, 1.1]
GRIDS = pd.DataFrame({"optimizer": "adamw", "setting": "lr", "factor": [0.5, 1.0, 2.0]})
GRIDS = GRIDS.assign(gap=[0.1, 0.0, 0.2], is_edge=False)
ARMS = pd.DataFrame({"arm": ["a", "a", "b", "b"], "seconds": 2.0, "loss": [3.0, 3.1, 2.9, 3.2]})
GAINS = pd.DataFrame({"arm": ["x", "x"], "shape": ["1x64", "2x128"], "difference": [-0.1, 0.1]})
GAINS = GAINS.assign(low=GAINS.difference - 0.1, high=GAINS.difference + 0.1)
FIGURES = {
    "domain_mix": lambda: plots.domain_mix(DOMAINS),
    "speed_ups": lambda: plots.speed_ups(SPEEDS),
    "iso_time": lambda: plots.iso_time(POINTS, OPTIMA, {"20:1": 2e6}),
    "loss_by_time": lambda: plots.loss_by_time(OPTIMA, OPTIMA, OPTIMA),
    "predicted_loss": lambda: plots.predicted_loss(POINTS),
    "rate_grids": lambda: plots.rate_grids(GRIDS, 0.02),
    "arms": lambda: plots.arms(ARMS),
    "gains": lambda: plots.gains({"one": GAINS, "two": GAINS[:1]}),
    "loss_by_budget": lambda: plots.loss_by_budget(ARMS, 3.0),
    "training_curve": lambda: plots.training_curve(CURVE, 2.4),
    "compare_curves": lambda: plots.compare_curves({"one": CURVE, "two": CURVE}),
    "domain_scores": lambda: plots.domain_scores(DOMAIN_LOSSES),
    "published_loss": lambda: plots.published_loss(3.0, 1.5e14, 20.0),
}


def test_every_figure_is_tested_here():
    drawn = {name for name, draw in vars(plots).items() if hasattr(draw, "__wrapped__")}
    assert set(FIGURES) == drawn


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_names_its_quantity_and_the_style_stays_ours(name):
    before = dict(plt.rcParams)
    figure = FIGURES[name]()
    assert dict(plt.rcParams) == before and not plt.get_fignums()
    last, shared = figure.axes[-1], figure.axes[-1].get_shared_x_axes()
    assert last.get_xlabel() or last.get_ylabel()
    assert all(a.get_xlabel() or a.get_ylabel() or shared.joined(a, last) for a in figure.axes)
    assert any(axes.get_title(loc="left") for axes in figure.axes)


def test_a_best_rate_at_the_edge_of_its_grid_has_a_ring():
    for is_edge, styles in ((True, ["full", "none"]), (False, ["full"])):
        lines = plots.rate_grids(GRIDS.assign(is_edge=is_edge), 0.02).axes[0].lines
        assert [line.get_fillstyle() for line in lines] == styles


def test_a_shape_keeps_its_colour_in_every_panel():
    figure = plots.gains({"both": GAINS, "second": GAINS[1:]})
    colours = [[bar[0].get_color() for bar in axes.containers] for axes in figure.axes]
    assert colours[1] == colours[0][1:] and len(set(colours[0])) == 2


def test_a_refused_optimum_has_no_point():
    refused = OPTIMA.assign(n_params=nan, loss=nan)
    for optima, n_points in ((OPTIMA, 1), (refused, 0)):
        [bars, _] = plots.loss_by_time(optima, refused, optima).axes[0].containers
        assert pd.notna(bars[0].get_ydata()).sum() == n_points
        [bars] = plots.iso_time(POINTS, optima, {}).axes[0].containers
        assert len(bars[0].get_xdata()) == n_points


def test_experiments_differ_without_colour_and_keep_their_looks():
    looks = style.looks(list("abcdefg"))
    assert len({(str(look["linestyle"]), look["marker"]) for look in looks.values()}) == 7
    assert style.looks(["a", "b"])["b"] == looks["b"]


def test_a_curve_appears_only_where_its_axis_is_known():
    alien = CURVE.assign(seconds=nan, flops=nan, val_loss=nan)
    figure = plots.compare_curves({"ours": CURVE, "theirs": alien})
    assert [len(axes.lines) for axes in figure.axes] == [2, 1, 1]
    [legend] = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["ours", "theirs (training)"]


def test_a_score_is_a_line_and_trials_are_points_in_every_panel_that_they_know():
    score = CURVE[:1].assign(kind="score", val_loss=9.0, **dict.fromkeys(analysis.AXES, nan))
    trials = CURVE.assign(kind="trial", val_loss=3.0, seconds=nan)
    figure = plots.compare_curves({"ours": CURVE, "score": score, "trials": trials})
    assert [len(axes.lines) for axes in figure.axes] == [3, 2, 3]
    assert {axes.lines[1].get_ydata()[0] for axes in figure.axes} == {9.0}
    assert figure.axes[0].get_ylim()[1] > 9
    assert {axes.lines[2].get_linestyle() for axes in figure.axes[::2]} == {"None"}


def test_comparison_shows_the_end_of_a_run_and_not_how_it_began():
    steps = np.arange(1.0, 21)
    curve = pd.DataFrame({"kind": "eval", "step": steps, "tokens": steps, "val_loss": 60 / steps})
    curve.loc[20] = ["final", 20.0, 20.0, 2.5]
    [axes] = plots.compare_curves({"one": curve}, ["tokens"]).axes
    final, line = axes.lines
    assert (final.get_ydata().tolist(), len(line.get_ydata())) == ([2.5], 20)
    low, high = axes.get_ylim()
    assert low < 2.5 and 15 < high < 20


@pytest.mark.parametrize("name", ["a_1$ $b^2$", "_hidden", r"\$\frac{", "two\nlines", "[x]*%s{}"])
def test_names_of_folders_and_runs_are_shown_as_they_are(name):
    table = pd.DataFrame({"domain": [name, "b"], "share": [0.5, 0.5], "bytes_per_token": [3, 4]})
    scores = table.assign(run=name, **{f"bits_per_byte{end}": 1.0 for end in ("", "_low", "_high")})
    for figure in (plots.domain_mix(table), plots.domain_scores(scores)):
        figure.canvas.draw()
        texts = list(figure.axes[0].get_yticklabels())
        for legend in figure.legends:
            texts += legend.get_texts()
        shown = [text._preprocess_math(text.get_text()) for text in texts]
        assert not any(is_math for _, is_math in shown)
        assert {text.strip("\u200b") for text, _ in shown} == {name.replace("\n", "\ufffd"), "b"}
    assert len(legend.get_texts()) == 1  # a name that begins with _ is not left out


def test_numbers_read_short():
    shown = {179_983_360: "180M", 1.5e9: "1.5B", 950: "950", 0: "0", 33_400: "33.4k", 999_999: "1M"}
    assert {value: style.short_number(value) for value in shown} == shown


def test_panels_are_plain_figures_until_somebody_can_touch_them(monkeypatch):
    def both():
        return plots.curve_panel({"one": CURVE}, 0.1), plots.sizing_panel(3.0, {"here": 1e12})

    assert all(isinstance(panel, plt.Figure) for panel in both())
    monkeypatch.setattr(plots, "is_attended", lambda: True)
    pytest.importorskip("ipywidgets")
    curves, sizes = both()
    assert (len(curves.children), len(sizes.children)) == (3, 4)  # controls and the figure
    sizes.update()
    assert isinstance(sizes.result, plt.Figure) and sizes.auto_display
