"""The figures: one style, one function per figure, data in, figure out. No torch.

Every experiment keeps its colour, marker and line style, in the order of the style's cycle. A title
names what is shown; it states a finding only where the caller, who knows the noise, passes one.
"""

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
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from llmlib import analysis, sizing
from llmlib.analysis import literal

STYLE = Path(__file__).with_suffix(".mplstyle")
BLUE, ORANGE, SKY, BLACK = "#0072B2", "#D55E00", "#56B4E9", "#000000"
N_DOMAINS = 15  # of a corpus that are shown
DOTTED = {"color": BLACK, "linestyle": ":", "linewidth": 1}
POINTS = {  # kinds of rows that no line joins
    "final": {"linestyle": "", "markersize": 9, "fillstyle": "none"},
    "trial": {"linestyle": "", "marker": ".", "color": "#BBBBBB", "zorder": 0},
}
LABELS = {
    "tokens": "Training tokens",
    "seconds": "Budget spent [s]",
    "flops": "Compute [FLOP]",
    "val_loss": "Validation loss [nats/token]",
    "n_params": "Parameters",
}


def styled(draw: Callable[..., None]) -> Callable[..., Figure]:
    """Let ``draw`` fill a figure in the shared style, and return it; callers leave the figure out.

    Log axes get short tick labels, and everything with a label appears in one legend below.
    """

    @wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        with plt.style.context(STYLE):
            figure, labelled = plt.figure(figsize=(7.2, 3.8)), {}
            draw(figure, *args, **kwargs)
            for axes in figure.axes:
                _format_log_axes(axes)
                handles, labels = axes.get_legend_handles_labels()
                labelled |= dict(zip(labels, handles, strict=True))
            if labelled:
                figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=4)
        plt.close(figure)  # a notebook shows the returned figure, once
        return figure

    return wrapper


def _format_log_axes(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            if high / low < 30:  # powers of ten alone are too few
                near, far = MaxNLocator(4, steps=[1, 2, 5, 10]), LogLocator(subs=(1, 2, 5))
                axis.set_major_locator(near if high / low < 5 else far)
            axis.set_major_formatter(FuncFormatter(short_number))
            axis.set_minor_formatter(NullFormatter())


def short_number(value: float, _: Any = None) -> str:
    """Write a number with at most three digits and k, M, B or T: 950, 1.5k, 33k, 2.1M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Give each experiment its colour, line style and marker."""
    with plt.style.context(STYLE):
        return dict(zip(names, cycle(plt.rcParams["axes.prop_cycle"])))


def _spread(table: pd.DataFrame, name: str) -> list[pd.Series]:
    """Return the distances of an interval's ends from its middle, for error bars."""
    return [table[name] - table[f"{name}_low"], table[f"{name}_high"] - table[name]]


def _limit_y(axes: Axes, values: Sequence[float | None]) -> None:
    """Let an axis end a little beyond values, where they differ."""
    shown = pd.Series(values, dtype=float)
    margin = 0.1 * (shown.max() - shown.min())
    if margin > 0:
        axes.set_ylim(shown.min() - margin, shown.max() + margin)


@styled
def domain_mix(figure: Figure, table: pd.DataFrame) -> None:
    """Show each domain's share of tokens and how many bytes a token holds there."""
    table = table.head(N_DOMAINS).iloc[::-1].assign(domain=lambda t: t.domain.map(literal))
    figure.set_figheight(0.9 + 0.24 * len(table))
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(table.domain, 100 * table.share, color=BLUE)
    left.set(xlabel="Share of training tokens [%]", title="The largest domains")
    right.plot(table.bytes_per_token, table.domain, "o", color=ORANGE)
    right.set(xlabel="Text per token [bytes]", xlim=(0, 1.1 * table.bytes_per_token.max()))
    for axes in (left, right):
        axes.grid(axis="y", visible=False)


@styled
def speed_ups(figure: Figure, table: pd.DataFrame) -> None:
    """Show how much faster our step is than each variant: ``bench.measure``'s table, ours first."""
    table = table.dropna(subset="speed_up").iloc[:0:-1]
    figure.set_figheight(1.4 + 0.34 * len(table))
    axes = figure.subplots()
    spread = _spread(table, "speed_up")
    axes.errorbar(table.speed_up, table.name, xerr=spread, fmt="o", capsize=3, label="measured")
    hollow = {"color": ORANGE, "marker": "D", "linestyle": "", "fillstyle": "none"}
    axes.plot(table.claim.where(table.claim != 1), table.name, label="claimed", **hollow)
    axes.axvline(1, **DOTTED)
    axes.set(xlabel="Speed of our step over the variant's [ratio]", title="Ablations of the step")


@styled
def iso_time(figure: Figure, points: pd.DataFrame, optima: pd.DataFrame, marks: dict) -> None:
    """Show loss by size for each time, with ``isotime.find_optima``'s minima and two marked sizes."""
    axes = figure.subplots()
    for seconds, part in points.groupby("seconds"):
        colour = plt.cm.cividis(0.85 * (points.seconds < seconds).mean())
        axes.plot(part.n_params, part.loss, "o", color=colour, markersize=4)
        axes.plot(part.groupby("n_params").loss.mean(), "-", color=colour, label=f"{seconds:g} s")
    stand = optima.dropna(subset="n_params")
    bars = {"xerr": _spread(stand, "n_params"), "fmt": "D--", "color": ORANGE, "capsize": 3}
    axes.errorbar(stand.n_params, stand.loss, zorder=3, label="minimum, 90 %", **bars)
    for (name, n_params), style in zip(marks.items(), (":", "-."), strict=False):
        axes.axvline(n_params, color=BLACK, linestyle=style, linewidth=1, label=name)
    axes.set(xscale="log", xlabel=LABELS["n_params"], ylabel=LABELS["val_loss"])
    axes.set(title="Loss by size for equal training time")


@styled
def loss_by_time(figure: Figure, optima: pd.DataFrame, held_out: pd.DataFrame, line: Any) -> None:
    """Show the loss at the best size by time: measured, predicted, and the line (same columns)."""
    axes = figure.subplots()
    axes.fill_between(line.seconds, line.loss_low, line.loss_high, alpha=0.2, label="line, 90 %")
    for label, table in {"predicted from shorter times": held_out, "measured": optima}.items():
        axes.errorbar(table.seconds, table.loss, _spread(table, "loss"), ls="", label=label)
    axes.set(xscale="log", xlabel="Training time [s]", ylabel=LABELS["val_loss"])
    axes.set(title="Loss at the best size by training time")


@styled
def predicted_loss(figure: Figure, points: pd.DataFrame) -> None:
    """Show what all times but the longest predict for every run against what it measured."""
    axes = figure.subplots()
    for seconds, part in points.groupby("seconds"):
        look = {"fillstyle": "none" if seconds == points.seconds.max() else "full"}
        axes.plot(part.loss, part.predicted, linestyle="", label=f"{seconds:g} s", **look)
    axes.axline((points.loss.min(),) * 2, slope=1, **DOTTED)
    axes.set(xlabel="Measured loss [nats/token]", ylabel="Predicted loss [nats/token]")
    axes.set(title="Predicted against measured loss (hollow: held out)")


@styled
def rate_grids(figure: Figure, table: pd.DataFrame, noise: float) -> None:
    """Show loss by learning rate (``study.grids``), from each grid's best; a band for the noise."""
    names = {"lr": "hidden matrices", "embed_lr": "embedding"}
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    look = looks(table.optimizer.unique())
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        for optimizer, part in table[table.setting == name].groupby("optimizer", sort=False):
            axes.plot(part.factor, part.gap, label=optimizer, **look[optimizer])
            if part.is_edge.any():
                axes.plot(1, 0, "o", color=BLACK, markersize=12, fillstyle="none")
        axes.axhspan(0, noise, color="#DDDDDD", zorder=0)
        axes.set(xscale="log", xlabel="Rate / best rate", title=f"Rate of the {title}")
    panels[0].set(ylabel="Loss above the best [nats/token]")


@styled
def arms(figure: Figure, table: pd.DataFrame, noise: float) -> None:
    """Show each arm's final losses, a point per seed, the mean and a band for the noise about it."""
    names = table.groupby("arm").loss.mean().sort_values(ascending=False).index
    figure.set_figheight(1.2 + 0.36 * len(names))
    axes = figure.subplots()
    for place, name in enumerate(names):
        losses = table.loc[table.arm == name, "loss"]
        axes.plot(losses, [place] * len(losses), "o", color=BLUE, markersize=4)
        axes.plot(losses.mean(), place, "|", markersize=18, color=BLACK)
        axes.barh(place, 2 * noise, 0.7, losses.mean() - noise, color="#DDDDDD", zorder=0)
    axes.set_yticks(range(len(names)), [literal(name) for name in names])
    axes.set(xlabel=LABELS["val_loss"], title="Equal time: points are seeds, bars their means")
    axes.grid(axis="y", visible=False)


@styled
def gains(figure: Figure, panels: dict[str, pd.DataFrame]) -> None:
    """Show differences in loss with 95 % intervals; ``panels`` has arm, shape, difference, low, high."""
    heights = [table.arm.nunique() for table in panels.values()]
    look = looks(sorted({shape for table in panels.values() for shape in table["shape"]}))
    figure.set_figheight(1.6 + 0.24 * sum(heights))
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, table) in zip(rows, panels.items(), strict=True):
        order = list(table.arm.unique())[::-1]
        for i, (shape, part) in enumerate(table.groupby("shape")):
            places = [order.index(arm) + 0.15 - 0.3 * i for arm in part.arm]
            spread = [part.difference - part.low, part.high - part.difference]
            bars = {"xerr": spread, "capsize": 2, "label": shape}
            axes.errorbar(part.difference, places, **(look[shape] | {"linestyle": ""}), **bars)
        axes.axvline(0, color=BLACK, linewidth=1)
        axes.set_yticks(range(len(order)), [literal(name) for name in order])
        axes.set(title=title, xlabel="Difference in validation loss [nats/token], 95 % interval")
        axes.grid(axis="y", visible=False)


@styled
def loss_by_budget(figure: Figure, table: pd.DataFrame, goal: float) -> None:
    """Show arms' losses by training time, a point per seed; dotted: the loss to reach."""
    axes = figure.subplots()
    look, points = looks(table.arm.unique()), {"linestyle": "", "markersize": 4}
    for name, part in table.groupby("arm", sort=False):
        axes.plot(part.groupby("seconds").loss.mean(), label=name, **(look[name] | {"marker": ""}))
        axes.plot(part.seconds, part.loss, **(look[name] | points))
    axes.axhline(goal, **DOTTED)
    axes.set(xscale="log", xlabel="Training time [s]", ylabel=LABELS["val_loss"])
    axes.set(title="Loss by training time")


@styled
def training_curve(figure: Figure, curve: pd.DataFrame, final_loss: float | None) -> None:
    """Show one run against the clock; without a final loss, it is still going on."""
    steps = analysis.smooth(curve, 1 / 40).query("kind == 'step'")
    evals = curve[curve.kind == "eval"]
    figure.set_figheight(5.6)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[4, 1, 1])
    blue = {"color": BLUE, "linestyle": "-", "marker": ""}
    pale, dashed = (blue | {"color": SKY}), {"color": ORANGE, "linestyle": "--", "marker": "s"}
    top.plot(steps.seconds, steps.loss, linewidth=0.6, label="training, steps", **pale)
    top.plot(steps.seconds, steps.smoothed, label="training, smoothed", **blue)
    top.plot(evals.seconds, evals.val_loss, label="validation", **dashed)
    top.set(ylabel="Loss [nats/token]", title="Loss so far")
    after = steps.smoothed.iloc[len(steps) // 20 :]  # the start would dwarf the rest
    _limit_y(top, [*after, *evals.val_loss.iloc[1:], final_loss])
    if final_loss is not None:
        top.axhline(final_loss, **DOTTED)
        top.set_title(f"Final validation loss {final_loss:.3f} nats/token (dotted)")
    middle.plot(steps.seconds, steps.lr, **blue)
    middle.set(ylabel="Rate")
    bottom.plot(steps.seconds, steps.grad_norm, linewidth=0.8, **blue)
    bottom.set(ylabel="Gradient\nnorm", yscale="log", xlabel=LABELS["seconds"])


@styled
def compare_curves(
    figure: Figure, curves: dict[str, pd.DataFrame], quantities: Sequence[str] = analysis.AXES
) -> None:
    """Show runs' validation loss against tokens, seconds and FLOPs, where they know them.

    A curve without validations shows its smoothed training loss, faintly. Hollow: the final score on
    all held-out documents. Pale: a study's run. A horizontal line: a score. The start may be cut off.
    """
    figure.set_figwidth(3.4 * len(quantities))
    [panels] = figure.subplots(1, len(quantities), sharey=True, squeeze=False)
    readable = []
    for panel, quantity in zip(panels, quantities, strict=True):
        for name, look in looks(list(curves)).items():
            rows, label, alpha = curves[name].dropna(subset="val_loss"), literal(name), 1.0
            if rows.empty:
                rows = curves[name].assign(val_loss=curves[name].smoothed).dropna(subset="val_loss")
                label, alpha = f"{label} (training)", 0.5
            if (rows.kind == "score").any():
                panel.axhline(rows.val_loss.max(), label=label, **look | {"marker": ""})
            rows = rows[rows[quantity] > 0]
            line = {"markevery": len(rows) // 8 + 1, "alpha": alpha}
            for kind, part in rows.groupby(rows.kind.where(rows.kind.isin(POINTS), "line")):
                style = look | POINTS.get(kind, line)
                panel.plot(part[quantity], part.val_loss, label=label, **style)
            late = rows[(rows[quantity] >= rows[quantity].max() / 5) & (rows.kind != "trial")]
            readable += [rows.val_loss.min(), *late.val_loss]
        panel.set(xscale="log", xlabel=LABELS[quantity])
    _limit_y(panels[0], readable)
    panels[0].set(ylabel=LABELS["val_loss"], title="Loss by tokens, time and compute")


@styled
def domain_scores(figure: Figure, table: pd.DataFrame, names: Sequence[str] = ()) -> None:
    """Show each run's bits per byte by domain, with ``analysis.domain_scores``'s intervals.

    ``names`` lists all runs that the reader meets, so that each keeps its look in every figure.
    """
    domains = table.groupby("domain").bits_per_byte.mean().sort_values(ascending=False).index
    shown = dict(list(table.groupby("run", sort=False)))
    figure.set_figheight(1.5 + (0.14 + 0.14 * len(shown)) * len(domains))
    axes, look = figure.subplots(), looks(names or list(shown))
    for i, (run, part) in enumerate(shown.items(), 1):
        places = domains.get_indexer(part.domain) + 0.4 - 0.8 * i / (len(shown) + 1)
        bars = {"xerr": _spread(part, "bits_per_byte"), "capsize": 3, "label": literal(run)}
        axes.errorbar(part.bits_per_byte, places, **(look[run] | {"linestyle": ""}), **bars)
    axes.set_yticks(range(len(domains)), [literal(domain) for domain in domains])
    axes.set(xlabel="Loss [bits per byte of text], 95 % interval", title="Loss by domain")
    axes.grid(axis="y", visible=False)


@styled
def published_loss(figure: Figure, hours: float, flops_per_s: float, ratio: float) -> None:
    """Show what the published fits predict for a budget by size, and what the write-up measured."""
    flops, axes = hours * 3600 * flops_per_s, figure.subplots()
    n_params = flops**0.5 * np.geomspace(0.022, 0.42, 121)
    for name, fit in sizing.PUBLISHED_FITS.items():
        axes.plot(n_params, fit.loss(n_params, flops / 6 / n_params), marker="", label=name)
    axes.plot([*sizing.WRITE_UP], [*sizing.WRITE_UP.values()], "ok", label="write-up's runs, 3 h")
    axes.axvline(sizing.params_at_ratio(flops, ratio), label=f"{ratio:.3g} to 1", **DOTTED)
    axes.set(xscale="log", xlabel=LABELS["n_params"], ylabel="Predicted loss [nats/token]")
    axes.set(title=f"Published fits, {hours:.3g} h at {flops_per_s:.2g} FLOP/s")
