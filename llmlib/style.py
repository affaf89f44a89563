"""The style of all figures: colours, labels of numbers and names, and what a figure is wrapped in.

Every experiment keeps its colour, marker and line style, in the order of the style's cycle.
"""

import re
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

STYLE = Path(__file__).with_suffix(".mplstyle")
BLUE, ORANGE = "#0072B2", "#D55E00"
DOTTED = {"color": "black", "linestyle": ":", "linewidth": 1}


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
            is_set = isinstance(axis.get_major_locator(), FixedLocator)
            if high / low < 30 and not is_set:  # powers of ten alone are too few
                near, far = MaxNLocator(4, steps=[1, 2, 5, 10]), LogLocator(subs=(1, 2, 5))
                axis.set_major_locator(near if high / low < 5 else far)
            axis.set_major_formatter(FuncFormatter(short_number))
            axis.set_minor_formatter(NullFormatter())


def short_number(value: float, _: Any = None) -> str:
    """Write a number with at most three digits and k, M, B or T: 950, 1.5k, 33k, 2.1M."""
    value = float(f"{value:.3g}")
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Give each experiment its colour, line style and marker."""
    with plt.style.context(STYLE):
        return dict(zip(names, cycle(plt.rcParams["axes.prop_cycle"])))


def spread(table: pd.DataFrame, name: str) -> list[pd.Series]:
    """Return the distances of an interval's ends from its middle, for error bars."""
    return [table[name] - table[f"{name}_low"], table[f"{name}_high"] - table[name]]


def limit_y(axes: Axes, values: Sequence[float | None]) -> None:
    """Let an axis end a little beyond values, where they differ."""
    shown = pd.Series(values, dtype=float)
    margin = 0.1 * (shown.max() - shown.min())
    if margin > 0:
        axes.set_ylim(shown.min() - margin, shown.max() + margin)


def literal(name: str) -> str:
    """Write a name as it is: no mathematics, no second line, not hidden from a legend."""
    shown = "".join(c if c.isprintable() else "\ufffd" for c in name)
    return re.sub("^_", "\u200b_", shown.replace("$", r"\$"))
