"""The figures: one style, one function per figure, data in, figure out. No torch.

Every experiment keeps its colour, marker and line style. Colours are Okabe and Ito's, which survive
colour blindness; line styles and markers carry the same information in greyscale.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from llmlib import runs

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
def throughput_bars(table: pd.DataFrame, peak_flops_per_s: float) -> Figure:
    """Show each setting's speed with its quartiles, relative to the first."""
    table = table.iloc[::-1]
    figure, axes = plt.subplots(figsize=(7.2, 0.9 + 0.36 * len(table)))
    low, high = (
        table.tokens_per_s - table.tokens_per_s_low,
        table.tokens_per_s_high - table.tokens_per_s,
    )
    base = table.iloc[-1].tokens_per_s
    colors = [GREEN if name == table.iloc[-1].setting else BLUE for name in table.setting]
    axes.barh(table.setting, table.tokens_per_s, xerr=[low, high], color=colors, ecolor=BLACK)
    for y, row in enumerate(table.itertuples()):
        mfu = row.flops_per_s / peak_flops_per_s
        axes.annotate(
            f"{row.tokens_per_s / base:.2f}x, MFU {mfu:.0%}", (row.tokens_per_s_high, y),
            xytext=(6, 0), textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    axes.set(xlabel="Training speed [tokens/s], median and quartiles")
    axes.set_xlim(0, 1.28 * table.tokens_per_s_high.max())
    axes.grid(axis="y", visible=False)
    _thousands(axes.xaxis)
    fastest = table.loc[table.flops_per_s.idxmax()]
    axes.set_title(f"Most arithmetic per second: {fastest.setting}")
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
def training_curve(curve: pd.DataFrame, smoothed: pd.Series, final_loss: float) -> Figure:
    """Show one run: training loss raw and smoothed, and validation loss, against the clock."""
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
    axes.axhline(final_loss, color=BLACK, linestyle=":", linewidth=1)
    axes.set(xlabel=f"Budget spent [{name}]", ylabel="Loss [nats/token]")
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
def compare_curves(curves: dict[str, pd.DataFrame], column: str = "smoothed") -> Figure:
    """Show runs against tokens, seconds and FLOPs side by side."""
    unit, name = _time_unit(max(curve.seconds.max() for curve in curves.values()))
    axes_of = {
        "tokens": ("Training tokens", 1.0),
        "seconds": (f"Budget spent [{name}]", unit),
        "flops": ("Compute [FLOP]", 1.0),
    }
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.6), sharey=True)
    for panel, (quantity, (label, scale)) in zip(panels, axes_of.items(), strict=True):
        for look, (name, curve) in zip(cycle(LOOKS), curves.items()):
            steps = curve[curve.kind == "step"]
            panel.plot(
                steps[quantity] / scale, steps[column], label=name, markevery=0.12, **look
            )  # fmt: skip
        panel.set(xlabel=label)
        _thousands(panel.xaxis)
    panels[0].set(ylabel="Training loss, smoothed [nats/token]")
    panels[0].set_title("The same runs by tokens, time and compute")
    panels[-1].legend()
    return figure
