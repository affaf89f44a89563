"""Two figures with controls, for somebody who sits in JupyterLab; elsewhere the figure alone."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pandas as pd
from IPython import get_ipython
from matplotlib.figure import Figure

from llmlib import analysis, plots


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


def curve_panel(curves: dict[str, pd.DataFrame], smoothing: float) -> Any:
    """Explore curves by smoothing [share of a run's steps] and x axis."""

    def draw(smoothing: float = smoothing, axis: str = "all") -> Figure:
        shown = {name: analysis.smooth(curve, smoothing) for name, curve in curves.items()}
        return plots.compare_curves(shown, analysis.AXES if axis == "all" else [axis])

    return _panel(draw, smoothing=(0.001, 0.3, 0.001), axis=["all", *analysis.AXES])


def sizing_panel(hours: float, flops_per_s: dict[str, float]) -> Any:
    """Explore ``plots.published_loss`` by budget, device (name: achieved FLOP/s) and ratio."""
    devices, limits = list(flops_per_s), (0.01, max(24.0, hours), 0.01)

    def draw(hours: float = hours, device: str = devices[0], ratio: float = 20.0) -> Figure:
        return plots.published_loss(hours, flops_per_s[device], ratio)

    return _panel(draw, hours=limits, device=devices, ratio=(1.0, 100.0))
