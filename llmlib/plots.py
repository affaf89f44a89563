"""The figures: one style, one function per figure, data in, figure out. No torch.

Every experiment keeps its colour, marker and line style. Colours are Okabe and Ito's, which survive
colour blindness; line styles and markers carry the same information in greyscale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)

from llmlib import runs
from llmlib.surface import FLAT_NATS, Optima

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000",
)  # fmt: skip
LOOKS = [
    {"color": BLUE, "linestyle": "-", "marker": "o"},
    {"color": VERMILION, "linestyle": "--", "marker": "s"},
    {"color": GREEN, "linestyle": "-.", "marker": "^"},
    {"color": PURPLE, "linestyle": ":", "marker": "D"},
    {"color": ORANGE, "linestyle": (0, (5, 1)), "marker": "v"},
    {"color": SKY, "linestyle": (0, (3, 1, 1, 1)), "marker": "P"},
    {"color": BLACK, "linestyle": (0, (1, 1)), "marker": "X"},
]
HATCHES = ["", "//", "..", "xx", "\\\\", "++", "oo"]  # the same for bars
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "llmlib",
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw under the shared style without touching the reader's own; closes nothing, shows nothing."""

    @wraps(draw)
    def wrapper(*args, **kwargs) -> Figure:
        with plt.rc_context(STYLE):
            figure = draw(*args, **kwargs)
        plt.close(figure)  # a notebook shows the returned figure, once
        return figure

    return wrapper


def save_figure(figure: Figure, data: pd.DataFrame, path: Path) -> Figure:
    """Write PNG, SVG and the data shown as CSV beside each other, and return the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure.savefig(path.with_suffix(".png"))
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    runs.write_atomic(path.with_suffix(".csv"), data.to_csv(index=False))
    return figure


def _thousands(axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda v, _: si(v)))


def si(value: float) -> str:
    """Write a number with three digits and k, M, B or T."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


@styled
def domain_mix(table: pd.DataFrame, n_shown: int = 15) -> Figure:
    """Show each domain's share of tokens and how many bytes a token holds there."""
    table = table.head(n_shown).iloc[::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 0.9 + 0.24 * len(table)), sharey=True)
    left.barh(table.domain, 100 * table.share, color=BLUE)
    left.set(xlabel="Share of training tokens [%]")
    top = table.iloc[-1]
    left.set_title(f"{top.domain} holds {top.share:.0%} of the tokens")
    right.plot(table.bytes_per_token, table.domain, "o", color=VERMILION)
    right.set(xlabel="Text per token [bytes]", xlim=(0, None))
    for axes in (left, right):
        axes.grid(axis="y", visible=False)
    return figure


@styled
def document_lengths(lengths: pd.DataFrame, seq_len: int) -> Figure:
    """Show how long documents are, beside the model's context."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    n = lengths.tokens
    bins = np.logspace(np.log10(max(n.min(), 1)), np.log10(n.max() + 1), 40)
    axes.hist(n, bins=bins, color=SKY, edgecolor="white", linewidth=0.4)
    axes.axvline(seq_len, color=VERMILION, linestyle="--")
    axes.annotate(
        f"context, {seq_len}", (seq_len, 1), xycoords=("data", "axes fraction"), color=VERMILION,
        xytext=(4, -4), textcoords="offset points", va="top",
    )  # fmt: skip
    axes.set(xscale="log", xlabel="Document length [tokens]", ylabel="Documents")
    axes.set_title(f"{(n > seq_len).mean():.0%} of documents are longer than the context")
    _thousands(axes.xaxis)
    return figure


@styled
def predicted_loss(curves: pd.DataFrame, marks: pd.DataFrame, title: str) -> Figure:
    """Show what published fits predict for one budget against model size, with choices marked."""
    figure, axes = plt.subplots(figsize=(7.2, 4))
    for look, (name, curve) in zip(cycle(LOOKS), curves.groupby("fit", sort=False)):
        best = curve.loc[curve.loss.idxmin()]
        look = look | {"marker": None}
        axes.plot(curve.n_params, curve.loss, label=name, **look)
        axes.plot(best.n_params, best.loss, "*", color=look["color"], markersize=13)
    for i, mark in enumerate(marks.itertuples()):
        axes.axvline(mark.n_params, color=BLACK, linestyle=":", linewidth=1)
        axes.annotate(
            mark.name, (mark.n_params, 0.97 - 0.09 * i), xycoords=("data", "axes fraction"),
            xytext=(5, 0), textcoords="offset points", va="top", fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    low, high = curves.loss.min(), curves.groupby("fit").loss.min().max()
    room = high - low + 0.1 * (high - curves.loss.min() + 1)
    axes.set_ylim(low - 0.6 * room, high + 2.5 * room)
    axes.set(xscale="log", xlabel="Parameters", ylabel="Predicted loss [nats/token]", title=title)
    axes.legend(loc="lower left")
    _thousands(axes.xaxis)
    return figure


def _time_unit(seconds: float) -> tuple[float, str]:
    """Choose the unit in which a run of this length reads best."""
    if seconds > 2 * 3600:
        return 3600.0, "h"
    return (60.0, "min") if seconds > 600 else (1.0, "s")


@styled
def training_curve(curve: pd.DataFrame, smoothed: pd.Series, final_loss: float | None) -> Figure:
    """Show one run: training loss raw and smoothed, and validation loss, against the clock.

    A run without a final loss is still going on.
    """
    steps, evals = curve[curve.kind == "step"], curve[curve.kind == "eval"]
    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    unit, name = _time_unit(curve.seconds.max())
    axes.plot(
        steps.seconds / unit, steps.loss, color=SKY, linewidth=0.7, label="training, each step"
    )
    axes.plot(steps.seconds / unit, smoothed, color=BLUE, label="training, smoothed")
    axes.plot(
        evals.seconds / unit,
        evals.val_loss,
        color=VERMILION,
        marker="s",
        linestyle="--",
        label="validation",
    )
    axes.set(xlabel=f"Budget spent [{name}]", ylabel="Loss [nats/token]")
    if final_loss is None:
        axes.set_title(f"Step {steps.step.max()}, training loss {smoothed.iloc[-1]:.3f} nats/token")
    else:
        axes.axhline(final_loss, color=BLACK, linestyle=":", linewidth=1)
        axes.set_title(f"Final validation loss {final_loss:.3f} nats/token")
    axes.legend()
    return figure


@styled
def budget_bar(seconds: pd.DataFrame) -> Figure:
    """Show what the budget was spent on."""
    figure, axes = plt.subplots(figsize=(7.2, 1.9))
    start, total = 0.0, seconds.seconds.sum()
    unit, name = _time_unit(total)
    colors = {
        "training": BLUE,
        "compile": ORANGE,
        "validation": GREEN,
        "checkpoint": PURPLE,
        "lost": BLACK,
    }
    hatches = {"compile": "//", "validation": "..", "checkpoint": "xx"}
    for kind, spent in seconds.itertuples(index=False):
        axes.barh(
            [0], spent / unit, left=start / unit, color=colors[kind], hatch=hatches.get(kind, ""),
            edgecolor="white", linewidth=0, label=f"{kind} {spent / total:.1%}",
        )  # fmt: skip
        start += spent
    training = seconds.loc[seconds.kind == "training", "seconds"].iloc[0]
    axes.set_title(f"{training / total:.0%} of the budget went into training steps")
    axes.set(xlabel=f"Budget [{name}]", yticks=[], ylim=(-0.5, 0.5))
    axes.grid(visible=False)
    figure.legend(loc="outside lower center", ncols=len(seconds), fontsize=9)
    return figure


@styled
def compare_curves(
    curves: dict[str, pd.DataFrame],
    quantities: Sequence[str] = ("tokens", "seconds", "flops"),
    names: Sequence[str] | None = None,
) -> Figure:
    """Show runs against tokens, seconds and FLOPs side by side; a run lacks what it does not know.

    ``names`` lists all runs that the reader meets, so that each keeps its look in every figure.
    """
    looks = dict(zip(names or curves, cycle(LOOKS)))
    unit, name = _time_unit(pd.concat(curves.values()).seconds.max())
    axes_of = {
        "tokens": ("Training tokens", 1.0),
        "seconds": (f"Budget spent [{name}]", unit),
        "flops": ("Compute [FLOP]", 1.0),
    }
    figure, [panels] = plt.subplots(
        1, len(quantities), figsize=(10, 3.6), sharey=True, squeeze=False
    )
    for panel, quantity in zip(panels, quantities, strict=True):
        label, scale = axes_of[quantity]
        for name, curve in curves.items():
            steps = curve[curve.kind == "step"].dropna(subset=quantity)
            x = steps[quantity] / scale
            panel.plot(x, steps.smoothed, label=name, markevery=0.12, **looks[name])
        panel.set(xlabel=label)
        _thousands(panel.xaxis)
    panels[0].set(ylabel="Training loss, smoothed [nats/token]")
    last = pd.Series({name: curve.smoothed.dropna().iloc[-1] for name, curve in curves.items()})
    panels[0].set_title(f"{last.idxmin()} has come lowest, to {last.min():.3f} nats/token")
    panels[-1].legend()
    return figure


@styled
def domain_bars(
    table: pd.DataFrame, names: Sequence[str] | None = None, n_shown: int = 15
) -> Figure:
    """Show each run's bits per byte by domain, for the domains with most tokens; names as above."""
    wide = table.pivot(index="domain", columns="run", values="bits_per_byte")
    order = table.groupby("domain").n_tokens.max().nlargest(n_shown).index
    wide = wide.loc[order, table.run.unique()]
    looks = dict(zip(names or wide, cycle(zip(LOOKS, HATCHES, strict=True))))
    wide = wide.loc[wide.mean(axis=1).sort_values(ascending=False).index]  # the easiest on top
    n_domains, n_runs = wide.shape
    figure, axes = plt.subplots(figsize=(7.2, 1.1 + n_domains * (0.1 + 0.16 * n_runs)))
    height = 0.8 / n_runs
    for i, run in enumerate(wide):
        look, hatch = looks[run]
        y = np.arange(n_domains) + 0.4 - (i + 0.5) * height
        axes.barh(
            y, wide[run], height, color=look["color"], hatch=hatch, edgecolor="white",
            linewidth=0, label=run,
        )  # fmt: skip
    axes.set(yticks=range(n_domains), yticklabels=wide.index, ylim=(-0.6, n_domains - 0.4))
    axes.set(xlabel="Loss [bits per byte of text]")
    axes.grid(axis="y", visible=False)
    easiest = wide.iloc[-1]
    axes.set_title(f"{easiest.name} is easiest, at {easiest.min():.2f} bits per byte")
    if n_runs > 1:
        figure.legend(loc="outside lower center", ncols=min(n_runs, 4), fontsize=9)
    return figure


@styled
def speed_ups(table: pd.DataFrame) -> Figure:
    """Show how much faster our step is with each lever than without: median, lowest and highest."""
    table = table.dropna(subset="speed_up").iloc[:0:-1]
    figure, axes = plt.subplots(figsize=(7.2, 1.1 + 0.34 * len(table)))
    low, high = table.speed_up - table.speed_up_low, table.speed_up_high - table.speed_up
    axes.errorbar(table.speed_up, table.name, xerr=[low, high], fmt="o", color=BLUE, capsize=3)
    for y, claim in enumerate(table.claim.fillna("")):
        if claim.removesuffix("x").replace(".", "").isdigit():
            label = None if axes.get_legend_handles_labels()[1] else "the write-up's claim"
            axes.plot(float(claim[:-1]), y, "D", color=VERMILION, fillstyle="none", label=label)
    axes.axvline(1, color=BLACK, linestyle=":", linewidth=1)
    axes.set(xlabel="Speed of our step over the step named [ratio], all rounds")
    best = table.loc[table.speed_up.idxmax()]
    axes.set_title(f"Ours is {best.speed_up:.2f} times as fast as \u201c{best['name']}\u201d")
    if axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower center")
    return figure


@styled
def waterfall(table: pd.DataFrame) -> Figure:
    """Show the speed from the naive step to ours, with what each added lever multiplies it by."""
    figure, axes = plt.subplots(figsize=(7.2, 0.9 + 0.36 * len(table)))
    speed = table.tokens_per_s.to_numpy()
    before = np.concatenate([[0], speed[:-1]])
    y = np.arange(len(table))[::-1]
    gains = speed >= before
    axes.barh(y[1:], before[1:], color="#E6E6E6")
    axes.barh(y[gains], (speed - before)[gains], left=before[gains], color=GREEN)
    axes.barh(
        y[~gains], (before - speed)[~gains], left=speed[~gains], color=VERMILION, hatch="//",
        edgecolor="white", linewidth=0,
    )  # fmt: skip
    spread = [speed - table.tokens_per_s_low, table.tokens_per_s_high - speed]
    axes.errorbar(speed, y, xerr=spread, fmt="none", color=BLACK, capsize=2, linewidth=1)
    for i, row in enumerate(table.itertuples()):
        factor = "" if i == 0 else f", x{speed[i] / speed[i - 1]:.2f}"
        axes.annotate(
            f"{speed[i]:,.0f}{factor}", (max(row.tokens_per_s_high, before[i]), y[i]),
            xytext=(6, 0), textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    axes.set(yticks=y, yticklabels=table.name, xlabel="Training speed [tokens/s]")
    axes.set_xlim(0, 1.25 * table.tokens_per_s_high.max())
    axes.grid(axis="y", visible=False)
    axes.set_title(f"All levers together: {speed[-1] / speed[0]:.2f} times the naive step")
    _thousands(axes.xaxis)
    return figure


@styled
def speed_by_shape(table: pd.DataFrame, peak_flops_per_s: float) -> Figure:
    """Show speed and MFU against depth, shapes of about equal parameters joined by a line."""
    table = table.dropna(subset="tokens_per_s").sort_values("n_params")
    size = (table.n_params.pct_change() > 0.15).cumsum()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for look, (_, group) in zip(cycle(LOOKS), table.groupby(size)):
        group = group.sort_values("n_layer")
        spread = [group.tokens_per_s - group.tokens_per_s_low, group.tokens_per_s_high - group.tokens_per_s]  # fmt: skip
        label = f"{si(group.n_params.mean())} parameters"
        left.errorbar(group.n_layer, group.tokens_per_s, yerr=spread, capsize=2, **look)
        mfu = 100 * group.flops_per_s / peak_flops_per_s
        right.plot(group.n_layer, mfu, label=label, **look)
        for row, share in zip(group.itertuples(), mfu, strict=True):
            right.annotate(
                f"{row.n_layer}x{row.d_model}", (row.n_layer, share), xytext=(4, 4),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
    left.set(xlabel="Blocks", ylabel="Training speed [tokens/s]", ylim=(0, None))
    right.set(xlabel="Blocks", ylabel="MFU of the measured peak [%]", ylim=(0, None))
    right.margins(x=0.15)
    best = table.loc[table.flops_per_s.idxmax()]
    left.set_title(f"{best.n_layer} x {best.d_model} turns most of the peak into training")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    _thousands(left.yaxis)
    return figure


@styled
def time_breakdown(table: pd.DataFrame) -> Figure:
    """Show what one step's wall time goes into."""
    figure, axes = plt.subplots(figsize=(7.2, 2.1))
    start = 0.0
    hatches = cycle(["", "//", "..", "xx", "\\\\", "++", "oo"])
    for look, hatch, row in zip(cycle(LOOKS), hatches, table.itertuples()):
        axes.barh(
            [0], 1e3 * row.seconds, left=1e3 * start, color=look["color"], hatch=hatch,
            edgecolor="white", linewidth=0, label=f"{row.kind} {row.share:.1%}",
        )  # fmt: skip
        start += row.seconds
    top = table.loc[table.seconds.idxmax()]
    axes.set_title(f"{top.share:.0%} of a step is {top.kind}")
    axes.set(xlabel="Wall time of a step under the profiler [ms]", yticks=[])
    axes.grid(visible=False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


@styled
def growth(tables: dict[str, pd.DataFrame], fits: pd.DataFrame) -> Figure:
    """Show speed and memory against parameters, context and micro-batch, with fitted exponents."""
    labels = {"n_params": "Parameters", "seq_len": "Context [tokens]", "micro_batch": "Micro-batch [sequences]"}  # fmt: skip
    figure, rows = plt.subplots(2, len(tables), figsize=(9, 5.2), sharex="col")
    for column, (quantity, table) in zip(rows.T, tables.items(), strict=True):
        for axes, measured, look in zip(
            column, ("tokens_per_s", "memory_gib"), LOOKS, strict=False
        ):
            known = table.dropna(subset=measured).sort_values(quantity)
            x, y = known[quantity], known[measured]
            [fit] = fits[(fits.quantity == quantity) & (fits.measured == measured)].itertuples()
            line = np.exp(np.log(y).mean() + fit.exponent * (np.log(x) - np.log(x).mean()))
            axes.plot(x, y, color=look["color"], marker=look["marker"], linestyle="none")
            axes.plot(x, line, color=look["color"], linestyle=look["linestyle"])
            axes.set(xscale="log", yscale="log", xlabel=labels[quantity])
            power = f"power {fit.exponent:.2f} \u00b1 {fit.standard_error:.2f}"
            axes.set_title(power, fontsize=9, fontweight="normal")
            for axis, values in ((axes.xaxis, x), (axes.yaxis, y)):
                few = values.nunique() < 5
                axis.set_ticks(
                    np.unique(values) if few else np.geomspace(min(values), max(values), 4)
                )
                axis.set_minor_locator(NullLocator())
                _thousands(axis)
    rows[0, 0].set(ylabel="Training speed [tokens/s]")
    rows[1, 0].set(ylabel="Peak memory [GiB]")
    figure.suptitle(
        f"Speed goes as parameters to the power {fits.exponent.iloc[0]:.2f}",
        x=0.01, ha="left", fontweight="bold", fontsize=11,
    )  # fmt: skip
    return figure


@styled
def sizing_verdict(curve: pd.DataFrame, marks: pd.DataFrame, budget: str) -> Figure:
    """Show the loss that ``surface.best_size`` predicts for a budget at every size, with choices marked.

    ``marks`` has name and n_params; each is set on the curve, and its price against the best named.
    """
    figure, axes = plt.subplots(figsize=(7.2, 4.6))
    best, basin = curve.loc[curve.loss.idxmin()], curve[curve.in_basin].n_params
    axes.axvspan(
        basin.min(), basin.max(), facecolor="#EEEEEE", edgecolor="#BBBBBB", hatch="...",
        linewidth=0, label=f"within {FLAT_NATS:g} nats of the best",
    )  # fmt: skip
    if curve.loss_low.notna().any():
        axes.fill_between(
            curve.n_params, curve.loss_low, curve.loss_high, color=SKY, alpha=0.45, linewidth=0,
            label="interval of the prediction",
        )  # fmt: skip
    if curve.is_extrapolated.any():
        axes.plot(curve.n_params, curve.loss, "--", color=BLUE, label="beyond what was measured")
    if not curve.is_extrapolated.all():
        measured = curve.loss.where(~curve.is_extrapolated)
        label = "sizes and tokens as measured"
        axes.plot(curve.n_params, measured, "-", color=BLUE, linewidth=2.6, label=label)
    axes.plot(
        best.n_params, best.loss, "*", color=YELLOW, markeredgecolor=BLACK, markersize=17, zorder=3,
        label=f"best here: {si(best.n_params)}, {best.loss:.3f} nats/token",
    )  # fmt: skip
    losses = np.interp(np.log(marks.n_params), np.log(curve.n_params), curve.loss)
    for look, mark, loss in zip(cycle(LOOKS[1:]), marks.itertuples(), losses):
        axes.plot(
            mark.n_params, loss, look["marker"], color=look["color"], markersize=9,
            markeredgecolor=BLACK,
            label=f"{mark.name}: {si(mark.n_params)}, +{loss - best.loss:.3f} nats",
        )  # fmt: skip
    height = 1.15 * max(losses.max() - best.loss, 0.1)
    shown = np.append(curve[curve.loss < best.loss + height].n_params, marks.n_params)
    axes.set_ylim(np.nanmin([best.loss - 0.25 * height, best.loss_low]), best.loss + height)
    axes.set(xscale="log", xlim=(shown.min(), shown.max()))
    axes.set(xlabel="Parameters", ylabel="Predicted final loss [nats/token]")
    axes.set_title(
        f"{budget}: best near {si(best.n_params)} parameters,\n"
        f"and {si(basin.min())} to {si(basin.max())} do as well within {FLAT_NATS:g} nats"
    )
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    _ones_and_threes(axes.xaxis)
    return figure


def _ones_and_threes(axis) -> None:
    """Label 1, 3, 10, 30 ... on a log axis."""
    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_minor_formatter(NullFormatter())
    _thousands(axis)


@styled
def isoflops(found: Optima, others: dict[str, pd.DataFrame]) -> Figure:
    """Show the parabola at each FLOP level, and how its vertex grows beside what other methods say.

    ``others`` has each method's flops, n_params and, where it knows, is_extrapolated.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    levels = found.optima.flops
    colors = plt.get_cmap("cividis")(np.linspace(0, 0.9, len(levels)))
    for color, look, vertex in zip(colors, cycle(LOOKS), found.optima.itertuples()):
        points = found.slices[found.slices.flops == vertex.flops]
        ends = np.log([*points.n_params, vertex.n_params])
        x = np.linspace(ends.min(), ends.max(), 100)
        y = vertex.loss + vertex.curvature * (x - np.log(vertex.n_params)) ** 2
        label = f"{vertex.flops:.1e}".replace("e+", "e")
        left.plot(points.n_params, points.loss, look["marker"], color=color, label=label)
        left.plot(np.exp(x), y, color=color, linestyle=look["linestyle"], linewidth=1)
        fill = "none" if vertex.is_extrapolated else "full"
        left.plot(vertex.n_params, vertex.loss, "*", color=color, markersize=12, fillstyle=fill)
    left.set(xlabel="Parameters", ylabel="Loss [nats/token]", xscale="log")
    left.legend(title="compute [FLOP]", fontsize=9)
    for look, (name, table) in zip(
        cycle(LOOKS), {"IsoFLOP parabolas": found.optima, **others}.items()
    ):
        inside = ~table.get("is_extrapolated", pd.Series(False, table.index)).astype(bool)
        right.plot(table.flops, table.n_params, fillstyle="none", **look | {"linewidth": 0.8})
        right.plot(table.flops[inside], table.n_params[inside], label=name, **look)
    right.set(xlabel="Compute [FLOP]", ylabel="Best parameters", xscale="log", yscale="log")
    right.legend(fontsize=9)
    left.set_title("Filled stars: minima between sizes trained")
    if np.isfinite(found.standard_error):
        growth = f"{found.exponent:.2f} \u00b1 {found.standard_error:.2f}"
        right.set_title(f"Best size grows as C to the {growth}")
    else:
        right.set_title("Too few minima to say how they grow")
    for axis in (left.xaxis, right.yaxis):
        _ones_and_threes(axis)
    return figure


@styled
def fit_residuals(points: pd.DataFrame) -> Figure:
    """Show how far the measured losses lie from the fitted surface, against N and against D."""
    residual = 1e3 * np.log(points.loss / points.predicted)
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.3), sharey=True)
    for axes, quantity, label, look in zip(
        panels, ("n_params", "n_tokens"), ("Parameters", "Training tokens"), LOOKS, strict=False
    ):
        axes.plot(points[quantity], residual, look["marker"], color=look["color"], alpha=0.7)
        axes.axhline(0, color=BLACK, linestyle=":", linewidth=1)
        axes.set(xscale="log", xlabel=label)
        _ones_and_threes(axes.xaxis)
    panels[0].set(ylabel="Measured / fitted loss \u2212 1 [\u2030]")
    panels[0].set_title(f"Half of the points lie within {residual.abs().median():.1f} \u2030")
    return figure


OPTIMIZER_LOOKS = dict(
    zip(("adamw", "muon", "ademamix", "sophia", "sophia_writeup"), LOOKS[:5], strict=True)
)


@styled
def lr_sensitivity(table: pd.DataFrame) -> Figure:
    """Show final loss against peak learning rate for each optimizer; ``optimizer``, ``lr``, ``loss``."""
    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    finished = table.dropna(subset="loss")
    for name, rows in finished.groupby("optimizer", sort=False):
        rows = rows.sort_values("lr")
        axes.plot(rows.lr, rows.loss, label=name, **OPTIMIZER_LOOKS[name])
    best = finished.loc[finished.loss.idxmin()]
    axes.set_title(f"Lowest loss: {best.optimizer} at a peak rate of {best.lr:.2g}")
    axes.set(xscale="log", xlabel="Peak learning rate", ylabel="Validation loss [nats/token]")
    axes.legend(title="optimizer")
    return figure


@styled
def differences(table: pd.DataFrame, title: str) -> Figure:
    """Show how far each setting's loss is from its reference; ``group``, ``setting``, ``difference``."""
    figure, axes = plt.subplots(figsize=(7.2, 0.7 + 0.3 * len(table)))
    rows = table.iloc[::-1].reset_index(drop=True)
    for look, (group, part) in zip(cycle(LOOKS), rows.groupby("group", sort=False)):
        axes.hlines(part.index, 0, part.difference, color=look["color"], linewidth=1.5)
        axes.plot(
            part.difference, part.index, linestyle="", color=look["color"], marker=look["marker"],
            label=group, markersize=7,
        )  # fmt: skip
    axes.axvline(0, color=BLACK, linewidth=1)
    axes.set(yticks=rows.index, xlabel="Loss against the reference [nats/token] (left is better)")
    axes.set_yticklabels(rows.setting)
    axes.set_title(title)
    axes.legend()
    return figure


@styled
def finalists(curves: pd.DataFrame, title: str) -> Figure:
    """Show validation loss of recipes against wall clock and tokens; one thin line per seed."""
    unit, name = _time_unit(curves.seconds.max())
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 3.6), sharey=True)
    for look, (recipe, runs_) in zip(cycle(LOOKS), curves.groupby("recipe", sort=False)):
        for i, (_, run) in enumerate(runs_.groupby("seed")):
            label, thin = recipe if i == 0 else None, look | {"markersize": 3.5, "linewidth": 1.2}
            panels[0].plot(run.seconds / unit, run.val_loss, label=label, **thin)
            panels[1].plot(run.tokens, run.val_loss, **thin)
    panels[0].set(xlabel=f"Budget spent [{name}]", ylabel="Validation loss [nats/token]")
    panels[1].set(xlabel="Training tokens")
    _thousands(panels[1].xaxis)
    panels[0].set_title(title)
    panels[0].legend(title="recipe, one line per seed")
    return figure


@styled
def time_to_target(table: pd.DataFrame, title: str) -> Figure:
    """Show the share of the budget that each recipe needs for one loss; ``recipe``, ``share``, ``bound``."""
    figure, axes = plt.subplots(figsize=(7.2, 0.9 + 0.4 * len(table)))
    for look, row, y in zip(cycle(LOOKS), table.itertuples(), range(len(table) - 1, -1, -1)):
        axes.barh(y, row.share, color=look["color"], height=0.6)
        sign = "at most " if row.bound else ""
        axes.annotate(
            f"{sign}{row.share:.0%}", (row.share, y), xytext=(4, 0), textcoords="offset points",
            va="center",
        )  # fmt: skip
    axes.set(yticks=range(len(table)), xlim=(0, 1.15 * table.share.max()))
    axes.set_yticklabels(table.recipe.iloc[::-1])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="Share of the budget")
    axes.grid(axis="y", visible=False)
    axes.set_title(title)
    return figure
