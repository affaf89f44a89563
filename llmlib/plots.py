"""The figures: one style, one function per figure, data in, figure out. No torch.

Every experiment keeps its colour, marker and line style, in the order of the style's cycle. A title
names what is shown; it states a finding only where the caller, who knows the noise, passes one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from llmlib import analysis, sizing

STYLE = Path(__file__).with_suffix(".mplstyle")
BLUE, ORANGE, SKY, BLACK = "#0072B2", "#D55E00", "#56B4E9", "#000000"
LABELS = {
    "tokens": "Training tokens",
    "seconds": "Budget spent [s]",
    "flops": "Compute [FLOP]",
    "loss": "Training loss [nats/token]",
    "val_loss": "Validation loss [nats/token]",
    "n_params": "Parameters",
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw under the shared style without touching the reader's own; closes nothing, shows nothing."""

    @wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        with plt.style.context(STYLE):
            figure = draw(*args, **kwargs)
        plt.close(figure)  # a notebook shows the returned figure, once
        return figure

    return wrapper


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Give each experiment its colour, line style and marker."""
    with plt.style.context(STYLE):
        return dict(zip(names, cycle(plt.rcParams["axes.prop_cycle"])))


def short_number(value: float, _: Any = None) -> str:
    """Write a number with at most three digits and k, M, B or T: 950, 1.5k, 33k, 2.1M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _log_axis(axes: Axes, name: str = "x") -> None:
    """Scale an axis logarithmically, with few and short tick labels."""
    axis = getattr(axes, f"{name}axis")
    axes.set(**{f"{name}scale": "log"})
    low, high = axis.get_view_interval()
    if high / low < 30:  # within a decade or so, powers of ten alone are too few
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(short_number))
    axis.set_minor_formatter(NullFormatter())


@styled
def domain_mix(table: pd.DataFrame, n_shown: int = 15) -> Figure:
    """Show each domain's share of tokens and how many bytes a token holds there."""
    table = table.head(n_shown).iloc[::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 0.9 + 0.24 * len(table)), sharey=True)
    left.barh(table.domain, 100 * table.share, color=BLUE)
    left.set(xlabel="Share of training tokens [%]", title="The largest domains")
    right.plot(table.bytes_per_token, table.domain, "o", color=ORANGE)
    right.set(xlabel="Text per token [bytes]", xlim=(0, 1.1 * table.bytes_per_token.max()))
    for axes in (left, right):
        axes.grid(axis="y", visible=False)
    return figure


def _spread(table: pd.DataFrame, name: str) -> list[pd.Series]:
    """Return the distances of the lowest and highest turn from the median, for error bars."""
    return [table[name] - table[f"{name}_low"], table[f"{name}_high"] - table[name]]


@styled
def speed_ups(table: pd.DataFrame) -> Figure:
    """Show how much faster our step is than each variant: median over turns, lowest and highest."""
    table = table.dropna(subset="speed_up").iloc[:0:-1]
    figure, axes = plt.subplots(figsize=(7.2, 1.2 + 0.34 * len(table)))
    bars = {"fmt": "o", "color": BLUE, "capsize": 3, "label": "measured"}
    axes.errorbar(table.speed_up, table.name, xerr=_spread(table, "speed_up"), **bars)
    claims = table.dropna(subset="claim")
    claimed = {"linestyle": "", "marker": "D", "color": ORANGE, "fillstyle": "none"}
    axes.plot(claims.claim, claims.name, label="claimed", **claimed)
    axes.axvline(1, color=BLACK, linestyle=":", linewidth=1)
    axes.set(xlabel="Speed of our step over the variant's [ratio]", title="Ablations of the step")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def speed_by_shape(table: pd.DataFrame) -> Figure:
    """Show throughput against size, each shape labelled with its depth and width."""
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    table = table.dropna(subset="tokens_per_s")
    bars = {"yerr": _spread(table, "tokens_per_s"), "fmt": "o", "capsize": 3}
    axes.errorbar(table.n_params, table.tokens_per_s, **bars)
    for row in table.itertuples():
        place = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": 9}
        axes.annotate(row.name, (row.n_params, row.tokens_per_s), **place)
    axes.set(xlabel=LABELS["n_params"], ylabel="Training tokens per second")
    axes.set_title("Throughput by size (layers x width)")
    for name in "xy":
        _log_axis(axes, name)
    return figure


@styled
def loss_by_size(points: pd.DataFrame, answer: pd.DataFrame, marks: dict[str, float]) -> Figure:
    """Show measured losses by size and tokens, and the fit's loss at every size for the budget.

    ``answer`` as ``sizing.best_size`` returns it; ``marks`` name sizes [parameters].
    """
    figure, axes = plt.subplots(figsize=(7.2, 4))
    for n_tokens, part in points.sort_values("n_params").groupby("n_tokens"):
        axes.plot(part.n_params, part.loss, label=f"measured, {short_number(n_tokens)} tokens")
    low, high = points.n_params.min() / 2, points.n_params.max() * 2
    near = answer[answer.n_params.between(low, high)]
    axes.plot(near.n_params, near.loss, color=BLACK, linestyle="-", marker="", label="fit, budget")
    if "low" in near:
        axes.fill_between(near.n_params, near.low, near.high, color=BLACK, alpha=0.15)
    for i, (name, n_params) in enumerate(marks.items()):
        axes.axvline(n_params, color=BLACK, linestyle=":", linewidth=1)
        place = {"xycoords": ("data", "axes fraction"), "va": "top", "fontsize": 9}
        axes.annotate(f" {name}", (n_params, 0.98 - 0.08 * i), **place)
    lowest = min(points.loss.min(), near.loss.min())  # the fit may rise without bound
    axes.set(ylim=(lowest - 0.2, points.loss.max() + 0.2), xlim=(low, high))
    axes.set(xlabel=LABELS["n_params"], ylabel=LABELS["val_loss"])
    axes.set_title("Loss by size: measured, and fitted for the budget")
    _log_axis(axes)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def predicted_vs_measured(points: pd.DataFrame) -> Figure:
    """Show the fit's loss against the measured one for every run."""
    figure, axes = plt.subplots(figsize=(4.4, 4))
    for label, part in points.groupby("size", sort=False):
        axes.plot(part.loss, part.predicted, linestyle="", label=label)
    ends = [points.loss.min(), points.loss.max()]
    axes.plot(ends, ends, color=BLACK, linestyle=":", marker="", linewidth=1)
    axes.set(xlabel="Measured loss [nats/token]", ylabel="Fitted loss [nats/token]")
    axes.set_title("Fit against measurement")
    axes.legend()
    return figure


@styled
def lr_sensitivity(table: pd.DataFrame) -> Figure:
    """Show final loss against peak rate for each optimizer; an optimum at an edge is marked hollow."""
    figure, axes = plt.subplots(figsize=(7.2, 4))
    for name, part in table.dropna(subset="loss").groupby("optimizer", sort=False):
        part = part.sort_values("lr")
        [line] = axes.plot(part.lr, part.loss, label=name)
        best = part.loss.to_numpy().argmin()
        if best in (0, len(part) - 1):
            ring = {"markersize": 12, "fillstyle": "none", "color": line.get_color()}
            axes.plot(part.lr.iloc[best], part.loss.iloc[best], "o", **ring)
    axes.set(xscale="log", xlabel="Peak learning rate", ylabel=LABELS["val_loss"])
    axes.set_title("Loss by learning rate (ring: best at the edge of its grid)")
    axes.legend()
    return figure


@styled
def recipes(table: pd.DataFrame) -> Figure:
    """Show each recipe's final losses, a point per seed, with their mean."""
    names = list(table.recipe.unique())
    figure, axes = plt.subplots(figsize=(7.2, 1.2 + 0.5 * len(names)))
    for y, (name, look) in enumerate(looks(names).items()):
        losses = table.loc[table.recipe == name, "loss"]
        axes.plot(losses, np.full(len(losses), y), **(look | {"linestyle": ""}))
        axes.plot(losses.mean(), y, "|", markersize=22, color=BLACK)
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.6, len(names) - 0.4))
    axes.set(xlabel=LABELS["val_loss"], title="Recipes: a point per seed, a bar at the mean")
    axes.grid(axis="y", visible=False)
    return figure


@styled
def training_curve(curve: pd.DataFrame, final_loss: float | None) -> Figure:
    """Show one run against the clock: losses above, learning rate and gradient norm below.

    A run without a final loss is still going on.
    """
    steps = analysis.smooth(curve, 1 / 40).query("kind == 'step'")
    evals = curve[curve.kind == "eval"]
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(7.2, 5.4), sharex=True, height_ratios=[4, 1, 1]
    )
    plain = {"marker": "", "linestyle": "-"}
    top.plot(steps.seconds, steps.loss, color=SKY, linewidth=0.6, label="training, steps", **plain)
    top.plot(steps.seconds, steps.smoothed, color=BLUE, label="training, smoothed", **plain)
    dashed = {"color": ORANGE, "linestyle": "--", "marker": "s"}
    top.plot(evals.seconds, evals.val_loss, label="validation", **dashed)
    title = "Loss so far"
    if final_loss is not None:
        top.axhline(final_loss, color=BLACK, linestyle=":", linewidth=1)
        title = f"Final validation loss {final_loss:.3f} nats/token (dotted)"
    after = steps.smoothed.iloc[len(steps) // 20 :]
    shown = [*after, *evals.val_loss.iloc[1:], *([] if final_loss is None else [final_loss])]
    if len(shown) > 1 and max(shown) > min(shown):
        margin = 0.1 * (max(shown) - min(shown))
        top.set_ylim(min(shown) - margin, max(shown) + margin)
    top.set(ylabel="Loss [nats/token]", title=title)
    top.legend()
    middle.plot(steps.seconds, steps.lr, color=BLUE, **plain)
    middle.set(ylabel="Rate")
    bottom.plot(steps.seconds, steps.grad_norm, color=BLUE, linewidth=0.8, **plain)
    bottom.set(ylabel="Gradient\nnorm", yscale="log", xlabel=LABELS["seconds"])
    return figure


@styled
def compare_curves(
    curves: dict[str, pd.DataFrame],
    quantities: Sequence[str] = tuple(analysis.AXES),
    names: Sequence[str] | None = None,
) -> Figure:
    """Show runs' validation loss against tokens, seconds and FLOPs; a run lacks what it does not know.

    A curve without validations shows its smoothed training loss, faintly. ``names`` lists all runs
    that the reader meets, so that each keeps its look in every figure.
    """
    look = looks(names or list(curves))
    figure, [panels] = plt.subplots(
        1, len(quantities), figsize=(3.4 * len(quantities), 3.6), sharey=True, squeeze=False
    )
    for panel, quantity in zip(panels, quantities, strict=True):
        for name, curve in curves.items():
            has_evals = curve.val_loss.notna().any()
            shown = "val_loss" if has_evals else "smoothed"
            rows = curve.dropna(subset=[quantity, shown])
            rows = rows[rows[quantity] > 0]
            if len(rows):
                style = {"markevery": 0.15, "alpha": 1.0 if has_evals else 0.5} | look[name]
                label = name if has_evals else f"{name} (training)"
                panel.plot(rows[quantity], rows[shown], label=label, **style)
        panel.set(xlabel=LABELS[quantity])
        _log_axis(panel)
    panels[0].set(ylabel=LABELS["val_loss"], title="Loss by tokens, time and compute")
    handles = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    return figure


@styled
def domain_scores(
    table: pd.DataFrame, names: Sequence[str] | None = None, n_shown: int = 15
) -> Figure:
    """Show each run's bits per byte by domain, for the domains with most tokens; names as above."""
    wide = table.pivot(index="domain", columns="run", values="bits_per_byte")
    order = table.groupby("domain").n_tokens.max().nlargest(n_shown).index
    wide = wide.loc[order, table.run.unique()]
    wide = wide.loc[wide.mean(axis=1).sort_values(ascending=False).index]
    figure, axes = plt.subplots(figsize=(7.2, 1.3 + 0.24 * len(wide)))
    for run, look in looks(list(names or wide)).items():
        if run in wide:
            axes.plot(wide[run], wide.index, label=run, **(look | {"linestyle": ""}))
    axes.set(xlabel="Loss [bits per byte of text]", title="Loss by domain")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


@styled
def published_loss(hours: float, flops_per_s: float, tokens_per_parameter: float) -> Figure:
    """Show what the published fits predict for a budget at every size, with one ratio marked."""
    flops = hours * 3600 * flops_per_s
    n_params = np.geomspace(flops**0.5 / 1e3, flops**0.5, 121)
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    for name, fit in sizing.PUBLISHED_FITS.items():
        axes.plot(n_params, fit.loss(n_params, flops / 6 / n_params), marker="", label=name)
    marked, name = sizing.params_at_ratio(flops, tokens_per_parameter), "tokens per parameter"
    axes.axvline(marked, color=BLACK, linestyle=":", label=f"{tokens_per_parameter:.3g} {name}")
    axes.set(xlabel=LABELS["n_params"], ylabel="Predicted loss [nats/token]")
    axes.set_title(f"Published fits, {hours:.3g} h at {flops_per_s:.2g} FLOP/s")
    _log_axis(axes)
    axes.legend()
    return figure
