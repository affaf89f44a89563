"""The figures: one function per figure, data in, figure out. No torch.

A title names what is shown; it states a finding only where the caller, who knows the noise, passes
one. What all figures share is in ``style``; two have controls where somebody sits in JupyterLab.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython import get_ipython
from matplotlib.figure import Figure

from llmlib import analysis, sizing
from llmlib.style import BLUE, DOTTED, ORANGE, limit_y, literal, looks, short_number, spread, styled

Tables = dict[str, pd.DataFrame]  # by name
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


@styled
def domain_mix(figure: Figure, table: pd.DataFrame) -> None:
    """Show the share of tokens of the 15 largest domains and how many bytes a token holds there."""
    table = table.head(15).iloc[::-1].assign(domain=lambda t: t.domain.map(literal))
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
    axes, errors = figure.subplots(), spread(table, "speed_up")
    axes.errorbar(table.speed_up, table.name, xerr=errors, fmt="o", label="measured")
    claims = table.claim.where(table.claim != 1)
    axes.plot(claims, table.name, "D", color=ORANGE, fillstyle="none", label="claimed")
    axes.axvline(1, **DOTTED)
    axes.set(xlabel="Speed of our step over the variant's [ratio]", title="Ablations of the step")


def _by_time(points: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, dict[str, Any]]]:
    """Yield each time's points with a marker and a colour of cividis, the longest the lightest."""
    times = points.groupby("seconds")
    shades = plt.cm.cividis(np.linspace(0, 0.85, len(times)))
    for (seconds, part), color, marker in zip(times, shades, cycle("os^Dv"), strict=False):
        yield part, {"color": color, "marker": marker, "linestyle": "", "label": f"{seconds:g} s"}


@styled
def iso_time(figure: Figure, points: pd.DataFrame, optima: pd.DataFrame, marks: dict) -> None:
    """Show loss by size for each time, with ``isotime.find_optima``'s parabolas and two sizes."""
    axes = figure.subplots()
    for part, look in _by_time(points):
        axes.plot(part.n_params, part.loss, **look)
    stand = optima.dropna(subset="n_params")
    n_params, loss, curvature = stand[["n_params", "loss", "curvature"]].to_numpy().T
    far = np.log(5) * np.linspace(-1, 1)[:, None]
    axes.plot(n_params * np.exp(far), loss + curvature * far**2, "k-", linewidth=0.7)
    bars = {"xerr": spread(stand, "n_params"), "fmt": "D--", "color": ORANGE, "zorder": 3}
    axes.errorbar(n_params, loss, label="fitted minimum, 90 %", **bars)
    for (name, size), style in zip(marks.items(), (":", "-."), strict=False):
        axes.axvline(size, color="black", linestyle=style, linewidth=1, label=name)
    axes.set(xscale="log", xlabel=LABELS["n_params"], ylabel=LABELS["val_loss"])
    axes.set(title="Loss by size for equal training time")
    limit_y(axes, points.loss)


@styled
def loss_by_time(figure: Figure, optima: pd.DataFrame, held_out: pd.DataFrame, line: Any) -> None:
    """Show the loss at the best size by time: fitted, predicted, and the line (same columns)."""
    axes = figure.subplots()
    band = {"alpha": 0.2, "label": "power law, 90 % interval"}
    axes.fill_between(line.seconds, line.loss_low, line.loss_high, **band)
    tables = {"fitted minimum": (optima, 1.0), "from shorter times": (held_out, 1.04)}
    for label, (table, shift) in tables.items():  # beside each other
        axes.errorbar(shift * table.seconds, table.loss, spread(table, "loss"), ls="", label=label)
    axes.set(xscale="log", xlabel="Training time [s]", ylabel=LABELS["val_loss"])
    axes.set_xticks([*optima.seconds, *line.seconds.tail(1)])
    axes.set(title="Loss at the best size by training time")


@styled
def predicted_loss(figure: Figure, points: pd.DataFrame) -> None:
    """Show what all times but the longest predict for every run against what it measured."""
    axes, is_last = figure.subplots(), points.seconds == points.seconds.max()
    for part, look in _by_time(points):
        look["fillstyle"] = "none" if is_last[part.index].all() else "full"
        axes.plot(part.loss, part.predicted, **look)
    means = points[is_last].groupby("n_params")[["loss", "predicted"]].mean().dropna()
    for place, (size, row) in zip(cycle(((6, -10), (-12, 8))), means.iterrows(), strict=False):
        axes.annotate(short_number(size), row, xytext=place, textcoords="offset points")
    axes.axline((points.loss.min(),) * 2, slope=1, **DOTTED)
    axes.set(xlabel="Measured loss [nats/token]", ylabel="Predicted loss [nats/token]")
    axes.set(title="Predicted against measured loss (hollow: held out, with its parameters)")


@styled
def rate_grids(figure: Figure, table: pd.DataFrame, noise: float) -> None:
    """Show loss by rate (``study.grids``), to half a nat above each grid's best; a band for the noise."""
    names = {"lr": "hidden matrices", "embed_lr": "embedding"}
    panels = figure.subplots(1, 2, sharey=True)
    look = looks(table.optimizer.unique())
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        for optimizer, part in table[table.setting == name].groupby("optimizer", sort=False):
            axes.plot(part.factor, part.gap, label=optimizer, **look[optimizer])
            if part.is_edge.any():
                axes.plot(1, 0, "o", color="black", markersize=12, fillstyle="none")
        axes.axhspan(0, noise, color="#DDDDDD", zorder=0)
        axes.set(xscale="log", xlabel="Rate / best rate", title=f"Rate of the {title}")
        axes.set(ylim=(-0.02, 0.5), xticks=sorted(table[table.setting == name].factor.unique()))
    panels[0].set(ylabel="Loss above the best [nats/token]")


@styled
def arms(figure: Figure, table: pd.DataFrame) -> None:
    """Show each arm's final losses, a point per seed, with their mean and standard deviation."""
    losses = sorted(table.groupby("arm").loss, key=lambda pair: -pair[1].mean())
    figure.set_figheight(1.2 + 0.36 * len(losses))
    axes = figure.subplots()
    for place, (_, own) in enumerate(losses):
        seeds = place + np.linspace(-0.2, 0.2, len(own))
        axes.plot(own, seeds, "o", color=BLUE, markersize=4)
        axes.plot(own.mean(), place, "|", markersize=18, color="black")
        axes.barh(place, 2 * own.std(), 0.7, own.mean() - own.std(), color="#DDDDDD", zorder=0)
    axes.set_yticks(range(len(losses)), [literal(name) for name, _ in losses])
    axes.set(xlabel=LABELS["val_loss"], title="Equal time: seeds, mean and standard deviation")
    axes.grid(axis="y", visible=False)


@styled
def gains(figure: Figure, panels: Tables) -> None:
    """Show differences in loss with 95 % intervals; ``panels`` has arm, shape, difference, low, high."""
    heights = [table.arm.nunique() for table in panels.values()]
    look = looks(sorted({shape for table in panels.values() for shape in table["shape"]}))
    figure.set_figheight(1.6 + 0.24 * sum(heights))
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, table) in zip(rows, panels.items(), strict=True):
        order = list(table.arm.unique())[::-1]
        for i, (shape, part) in enumerate(table.groupby("shape")):
            height = 0.3 - 0.6 * (i + 0.5) / table["shape"].nunique()
            shift = height * (table.groupby("arm")["shape"].nunique()[part.arm] > 1)
            places = [order.index(arm) for arm in part.arm] + shift.to_numpy()
            both = [part.difference - part.low, part.high - part.difference]
            bars = {"xerr": both, "capsize": 2, "label": shape}
            axes.errorbar(part.difference, places, **(look[shape] | {"linestyle": ""}), **bars)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_yticks(range(len(order)), [literal(name) for name in order])
        axes.set(title=title, ylim=(-0.6, len(order) - 0.4))
        axes.grid(axis="y", visible=False)
    rows[-1].set(xlabel="Difference in validation loss [nats/token], 95 % interval")


@styled
def loss_by_budget(figure: Figure, table: pd.DataFrame, goal: float) -> None:
    """Show arms' losses by training time, a point per seed, and the loss to reach."""
    axes = figure.subplots()
    look, points = looks(table.arm.unique()), {"linestyle": "", "markersize": 4}
    for name, part in table.groupby("arm", sort=False):
        axes.plot(part.groupby("seconds").loss.mean(), label=name, **(look[name] | {"marker": ""}))
        axes.plot(part.seconds, part.loss, **(look[name] | points))
    axes.axhline(goal, label="loss to reach", **DOTTED)
    axes.set(xscale="log", xlabel="Training time [s]", ylabel=LABELS["val_loss"])
    axes.set(title="Loss by training time", xticks=sorted(table.seconds.unique()))


@styled
def training_curve(figure: Figure, curve: pd.DataFrame, final_loss: float | None) -> None:
    """Show one run against the clock; without a final loss, it is still going on."""
    steps = analysis.smooth(curve, 1 / 40).query("kind == 'step'")
    evals = curve[curve.kind == "eval"]
    figure.set_figheight(5.6)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[4, 1, 1])
    pale = {"color": "#56B4E9", "linewidth": 0.6}
    top.plot(steps.seconds, steps.loss, "-", label="training, steps", **pale)
    top.plot(steps.seconds, steps.smoothed, "-", color=BLUE, label="training, smoothed")
    top.plot(evals.seconds, evals.val_loss, "s--", color=ORANGE, label="validation")
    top.set(ylabel="Loss [nats/token]", title="Loss so far")
    after = steps.smoothed.iloc[len(steps) // 20 :]  # the start would dwarf the rest
    limit_y(top, [*after, *evals.val_loss.iloc[1:], final_loss])
    if final_loss is not None:
        top.axhline(final_loss, **DOTTED)
        top.set_title(f"Final validation loss {final_loss:.3f} nats/token (dotted)")
    middle.plot(steps.seconds, steps.lr, "-", color=BLUE)
    middle.set(ylabel="Learning\nrate")
    bottom.plot(steps.seconds, steps.grad_norm, "-", color=BLUE, linewidth=0.8)
    bottom.set(ylabel="Gradient\nnorm", yscale="log", xlabel=LABELS["seconds"])


@styled
def compare_curves(figure: Figure, curves: Tables, quantities: Sequence = analysis.AXES) -> None:
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
                readable.append(rows.val_loss.max())
            rows = rows[rows[quantity] > 0]
            line = {"markevery": len(rows) // 8 + 1, "alpha": alpha}
            for kind, part in rows.groupby(rows.kind.where(rows.kind.isin(POINTS), "line")):
                style = look | POINTS.get(kind, line)
                panel.plot(part[quantity], part.val_loss, label=label, **style)
            late = rows[(rows[quantity] >= rows[quantity].max() / 5) & (rows.kind != "trial")]
            readable += [rows.val_loss.min(), *late.val_loss]
        panel.set(xscale="log", xlabel=LABELS[quantity])
    limit_y(panels[0], readable)
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
        style = look[run] | {"xerr": spread(part, "bits_per_byte"), "linestyle": ""}
        axes.errorbar(part.bits_per_byte, places, label=literal(run), **style)
    axes.set_yticks(range(len(domains)), [literal(domain) for domain in domains])
    axes.set_ylim(-0.6, len(domains) - 0.4)
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
    axes.set(xscale="log", xlabel=LABELS["n_params"], ylabel="Loss [nats/token]")
    axes.set(title=f"Published fits, {hours:.3g} h at {flops_per_s / 1e12:.3g} TFLOP/s")


def is_attended() -> bool:
    """Say whether a person sits at the front end that runs this cell.

    A front end in which a person can answer a kernel says so with every cell it sends
    (``allow_stdin`` in Jupyter's messaging protocol); papermill says that nobody can.
    """
    parent = getattr(get_ipython(), "get_parent", dict)()
    return parent.get("content", {}).get("allow_stdin", False)


def _panel(draw: Callable[..., Figure], **controls: Any) -> Any:
    """Show what ``draw`` makes of controls, beginning at its defaults, or that first figure alone."""
    if not (is_attended() and find_spec("ipywidgets")):
        return draw()
    from ipywidgets import interactive

    return interactive(draw, {"auto_display": True}, **controls)


def curve_panel(curves: Tables, smoothing: float) -> Any:
    """Explore curves by smoothing [share of a run's steps] and x axis."""

    def draw(smoothing: float = smoothing, axis: str = "all") -> Figure:
        shown = {name: analysis.smooth(curve, smoothing) for name, curve in curves.items()}
        return compare_curves(shown, analysis.AXES if axis == "all" else [axis])

    return _panel(draw, smoothing=(0.001, 0.3, 0.001), axis=["all", *analysis.AXES])


def sizing_panel(hours: float, flops_per_s: dict[str, float]) -> Any:
    """Explore ``published_loss`` by budget, device (name: achieved FLOP/s) and ratio."""
    devices, limits = list(flops_per_s), (0.01, max(24.0, hours), 0.01)

    def draw(hours: float = hours, device: str = devices[0], ratio: float = 20.0) -> Figure:
        return published_loss(hours, flops_per_s[device], ratio)

    return _panel(draw, hours=limits, device=devices, ratio=(1.0, 100.0))
