"""The figures: one style, one function per figure, data in, figure out; two panels. No torch.

Every experiment keeps its colour, marker and line style, in the order of the style's cycle. A title
names what is shown; it states a finding only where the caller, who knows the noise, passes one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from llmlib import analysis

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
    right.set(xlabel="Text per token [bytes]", xlim=(0, None))
    for axes in (left, right):
        axes.grid(axis="y", visible=False)
    return figure


@styled
def speed_ups(table: pd.DataFrame) -> Figure:
    """Show how much faster our step is than each variant: median over rounds, lowest and highest."""
    table = table.dropna(subset="speed_up").iloc[:0:-1]
    figure, axes = plt.subplots(figsize=(7.2, 1.2 + 0.34 * len(table)))
    spread = [table.speed_up - table.speed_up_low, table.speed_up_high - table.speed_up]
    axes.errorbar(
        table.speed_up, table.name, xerr=spread, fmt="o", color=BLUE, capsize=3, label="measured"
    )
    claims = table.dropna(subset="claim")
    axes.plot(claims.claim, claims.name, "D", color=ORANGE, fillstyle="none", label="claimed")
    axes.axvline(1, color=BLACK, linestyle=":", linewidth=1)
    axes.set(xlabel="Speed of our step over the variant's [ratio]", title="Ablations of the step")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def speed_by_shape(table: pd.DataFrame) -> Figure:
    """Show throughput against size, each shape labelled with its depth and width."""
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    table = table.dropna(subset="tokens_per_s")
    low, high = table.tokens_per_s - table.tokens_per_s_low, table.tokens_per_s_high - table.tokens_per_s  # fmt: skip
    axes.errorbar(table.n_params, table.tokens_per_s, yerr=[low, high], fmt="o", capsize=3)
    for row in table.itertuples():
        place = (row.n_params, row.tokens_per_s)
        axes.annotate(row.name, place, xytext=(6, 4), textcoords="offset points", fontsize=9)
    axes.set(xlabel="Parameters", ylabel="Training tokens per second")
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
    for n_tokens, part in points.groupby("n_tokens"):
        part = part.sort_values("n_params")
        axes.plot(part.n_params, part.loss, label=f"measured, {short_number(n_tokens)} tokens")
    axes.plot(
        answer.n_params, answer.loss, color=BLACK, linestyle="-", marker="", label="fit, budget"
    )
    if "low" in answer:
        axes.fill_between(answer.n_params, answer.low, answer.high, color=BLACK, alpha=0.15)
    for i, (name, n_params) in enumerate(marks.items()):
        axes.axvline(n_params, color=BLACK, linestyle=":", linewidth=1)
        axes.annotate(
            name,
            (n_params, 0.98 - 0.08 * i),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            va="top",
            fontsize=9,
        )
    shown = np.concatenate([points.loss, answer.loss[answer.n_params.between(points.n_params.min() / 2, points.n_params.max() * 2)]])  # fmt: skip
    axes.set(ylim=(shown.min() - 0.2, shown.max() + 0.2), ylabel=LABELS["val_loss"])
    axes.set(xlim=(points.n_params.min() / 2, points.n_params.max() * 2), xlabel="Parameters")
    axes.set_title("Loss by size: measured, and predicted for the budget")
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
            axes.plot(part.lr.iloc[best], part.loss.iloc[best], "o", markersize=12, fillstyle="none", color=line.get_color())  # fmt: skip
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
        axes.plot(losses, np.full(len(losses), y), linestyle="", marker=look["marker"], color=look["color"])  # fmt: skip
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
    top.plot(evals.seconds, evals.val_loss, color=ORANGE, linestyle="--", marker="s", label="validation")  # fmt: skip
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


# ------------------------------------------------------------------------- in JupyterLab


def shell() -> Any | None:
    """Return the IPython shell that runs this, if one does; IPython need not be installed."""
    ipython = sys.modules.get("IPython")
    return ipython and ipython.get_ipython()


def display(what: Any, **options: Any) -> Any:
    """Display something in the shell that runs this."""
    from IPython.display import display as show

    return show(what, **options)


def is_attended() -> bool:
    """Say whether a person sits at the front end that runs this cell.

    A front end in which a person can answer a kernel says so with every cell it sends
    (``allow_stdin`` in Jupyter's messaging protocol); papermill says that nobody can.
    """
    parent = getattr(shell(), "get_parent", dict)()
    return parent.get("content", {}).get("allow_stdin", False)


def _panel(draw: Callable[..., Figure], make_controls: Callable[[Any], dict[str, Any]]) -> Any:
    """Show what ``draw`` makes of some controls, or with nobody to use them its first figure."""
    if not (is_attended() and find_spec("ipywidgets")):
        return draw()
    import ipywidgets

    controls = make_controls(ipywidgets)
    return ipywidgets.interactive(lambda **values: display(draw(**values)), **controls)


def curve_panel(curves: dict[str, pd.DataFrame], smoothing: float) -> Any:
    """Explore curves by smoothing [share of a run], x axis and choice of runs."""

    def draw(smoothing: float = smoothing, axis: str = "all", chosen: Sequence[str] = ()) -> Figure:
        shown = {name: analysis.smooth(curves[name], smoothing) for name in chosen or curves}
        axes = analysis.AXES if axis == "all" else [axis]
        return compare_curves(shown, axes, names=list(curves))

    return _panel(
        draw,
        lambda widgets: {
            "smoothing": widgets.FloatLogSlider(
                smoothing, min=-4, max=-0.5, readout_format=".4f", continuous_update=False
            ),
            "axis": widgets.Dropdown(options=["all", *analysis.AXES]),
            "chosen": widgets.SelectMultiple(options=list(curves), description="runs"),
        },
    )


@styled
def published_loss(hours: float, flops_per_s: float, tokens_per_parameter: float) -> Figure:
    """Show what the published fits predict for a budget at every size, with one ratio marked."""
    from llmlib import sizing

    flops = hours * 3600 * flops_per_s
    n_params = np.geomspace(flops**0.5 / 1e3, flops**0.5, 121)
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    for name, fit in sizing.PUBLISHED_FITS.items():
        axes.plot(n_params, fit.loss(n_params, flops / 6 / n_params), marker="", label=name)
    axes.axvline(
        sizing.params_at_ratio(flops, tokens_per_parameter), color=BLACK, linestyle=":", marker="",
        label=f"{tokens_per_parameter:.3g} tokens per parameter",
    )  # fmt: skip
    axes.set(xlabel="Parameters", ylabel="Predicted loss [nats/token]")
    axes.set_title(f"Published fits, {hours:.3g} h at {flops_per_s:.2g} FLOP/s")
    _log_axis(axes)
    axes.legend()
    return figure


def sizing_panel(hours: float, flops_per_s: dict[str, float]) -> Any:
    """Explore ``published_loss`` by budget, device (name: achieved FLOP/s) and ratio."""
    first = next(iter(flops_per_s))

    def draw(hours: float = hours, device: str = first, ratio: float = 20.0) -> Figure:
        return published_loss(hours, flops_per_s[device], ratio)

    return _panel(
        draw,
        lambda widgets: {
            "hours": widgets.BoundedFloatText(hours, min=0.001, max=1e5),
            "device": widgets.Dropdown(options=list(flops_per_s)),
            "ratio": widgets.FloatLogSlider(20.0, min=-0.5, max=2.5, continuous_update=False),
        },
    )
