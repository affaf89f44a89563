"""Panels to explore with, where somebody can touch them; elsewhere the figure they would begin with.

A front end in which a person can answer a kernel says so with every cell it sends (``allow_stdin``
in Jupyter's messaging protocol); papermill and nbconvert say that nobody can.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from llmlib import analysis, plots

if TYPE_CHECKING:
    from ipywidgets import VBox

AXES = {
    "all": ("tokens", "seconds", "flops"),
    "tokens": ("tokens",),
    "seconds": ("seconds",),
    "FLOPs": ("flops",),
}


def shell() -> Any | None:
    """Return the IPython shell that runs this, if one does; IPython need not be installed."""
    ipython = sys.modules.get("IPython")
    return ipython and ipython.get_ipython()


def display(what: Any, **options: Any) -> Any:
    """Display something in the shell that runs this."""
    from IPython.display import display as show

    return show(what, **options)


def is_attended() -> bool:
    """Say whether a person sits at the front end that runs this cell."""
    parent = getattr(shell(), "get_parent", dict)()
    return parent.get("content", {}).get("allow_stdin", False)


def curve_panel(curves: dict[str, pd.DataFrame], smoothing: float) -> VBox | Figure:
    """Explore curves by smoothing [share of a run], x axis and choice of runs."""

    def draw(smoothing: float, axis: str, chosen: Sequence[str]) -> Figure:
        shown = {name: analysis.smooth_share(curves[name], smoothing) for name in chosen or curves}
        return plots.compare_curves(shown, AXES[axis], names=list(curves))

    if not can_explore():
        return draw(smoothing, "all", [])
    import ipywidgets

    return _panel(
        draw,
        smoothing=ipywidgets.FloatLogSlider(
            smoothing, min=-4, max=-0.5, readout_format=".4f", continuous_update=False
        ),
        axis=ipywidgets.Dropdown(options=list(AXES)),
        chosen=ipywidgets.SelectMultiple(
            options=list(curves), value=list(curves), description="runs"
        ),
    )


def sizing_panel(
    draw: Callable[[float, str, float], Figure],
    *,
    hours: float,
    gpus: Sequence[str],
    tokens_per_parameter: float = 20.0,
) -> VBox | Figure:
    """Explore ``draw(hours, gpu, tokens_per_parameter)``, beginning with the first GPU."""
    if not can_explore():
        return draw(hours, gpus[0], tokens_per_parameter)
    import ipywidgets

    return _panel(
        draw,
        hours=ipywidgets.BoundedFloatText(hours, min=0.001, max=1e5),
        gpu=ipywidgets.Dropdown(options=list(gpus), description="GPU"),
        tokens_per_parameter=ipywidgets.FloatLogSlider(
            tokens_per_parameter,
            min=-0.5,
            max=2.5,
            description="ratio",
            readout_format=".1f",
            continuous_update=False,
        ),
    )


def can_explore() -> bool:
    """Say whether there is somebody to use a panel, and the package to make it with."""
    return is_attended() and find_spec("ipywidgets") is not None


def _panel(draw: Callable[..., Figure], **controls: Any) -> VBox:
    """Show the figure that ``draw`` makes of the controls' values, in their order, beneath them."""
    from ipywidgets import interactive

    return interactive(lambda **values: display(draw(*values.values())), **controls)
