"""Panels: what they draw when somebody moves a control, and what stands there when nobody can."""

import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from llmlib import plots, widgets


def curve(slope):
    steps = np.arange(1, 101)
    return pd.DataFrame(
        {"kind": "step", "step": steps, "tokens": 64 * steps, "seconds": 0.5 * steps}
        | {"flops": 1e6 * steps, "loss": 6 - slope * np.log(steps)}
    )


@pytest.fixture
def curves():
    return {"fast": curve(0.5), "slow": curve(0.2)}


@pytest.fixture
def asked():
    """What a sizing panel asked its function to draw."""
    return []


@pytest.fixture
def sizing_panel(asked):
    def draw(*values):
        asked.append(values)
        figure, _ = plt.subplots()
        plt.close(figure)
        return figure

    return lambda: widgets.sizing_panel(draw, hours=3.0, gpus=["A100", "H100"])


@pytest.fixture
def shown(monkeypatch):
    """What a panel has displayed, with a person in front of it."""
    pytest.importorskip("ipywidgets")
    figures = []
    monkeypatch.setattr(widgets, "is_attended", lambda: True)
    monkeypatch.setattr(widgets, "display", figures.append)
    return figures


def labels(figure):
    return [axes.get_xlabel() for axes in figure.axes]


def lines(figure):
    return [line.get_label() for line in figure.axes[0].lines]


def test_curve_panel_follows_its_controls(shown, curves):
    panel = widgets.curve_panel(curves, smoothing=0.025)
    smoothing, axis, chosen, _ = panel.children
    assert labels(shown[-1]) == ["Training tokens", "Budget spent [s]", "Compute [FLOP]"]
    assert lines(shown[-1]) == ["fast", "slow"]
    before = shown[-1].axes[0].lines[0].get_ydata()
    axis.value = "seconds"
    assert labels(shown[-1]) == ["Budget spent [s]"]
    chosen.value = ("slow",)
    assert lines(shown[-1]) == ["slow"]
    assert shown[-1].axes[0].lines[0].get_color() == plots.LOOKS[1]["color"]  # as beside "fast"
    chosen.value = ()  # nobody means to look at nothing
    assert lines(shown[-1]) == ["fast", "slow"]
    smoothing.value = 0.3
    assert shown[-1].axes[0].lines[0].get_ydata()[-1] > before[-1] + 0.05  # lags behind


def test_sizing_panel_asks_for_what_its_controls_say(shown, sizing_panel, asked):
    hours, gpu, ratio, _ = sizing_panel().children
    hours.value = 1.0
    gpu.value = "H100"
    ratio.value = 10.0
    assert asked == [
        (3.0, "A100", 20.0),
        (1.0, "A100", 20.0),
        (1.0, "H100", 20.0),
        (1.0, "H100", 10.0),
    ]
    assert len(shown) == 4


@pytest.mark.parametrize("missing", ["a-person", "the-package"])
def test_a_panel_that_cannot_be_used_is_its_first_figure(
    monkeypatch, curves, sizing_panel, asked, missing
):
    monkeypatch.setattr(widgets, "is_attended", lambda: missing != "a-person")
    if missing == "the-package":
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
    figure = widgets.curve_panel(curves, smoothing=0.025)
    assert len(labels(figure)) == 3
    assert lines(figure) == ["fast", "slow"]
    assert isinstance(sizing_panel(), Figure)
    assert asked == [(3.0, "A100", 20.0)]
