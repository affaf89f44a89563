"""What a full run will be, before anyone rents the machine: a plain table that starts nothing."""

import re

import numpy as np
import pandas as pd

from llmlib import devices, runs, sizing
from llmlib.config import get_scale
from llmlib.style import short_number

MFU = np.array([0.4, 0.6])  # of the datasheet's peak: what models of 100 to 200 M are reported at
TEXT_GB = {"DKYoon/SlimPajama-6B": (24, 12)}  # to download, and on disk as tokens
DISK_BYTES = 2 * 12 + 4  # per parameter: two checkpoints, and the weights


def make_plan(scale: str, hours: float, gpu: str, runs_dir: str = "") -> pd.DataFrame:
    """Tabulate what a run is and needs, and what of it is measured, computed or assumed.

    Without a ``gpu`` ("A100 80GB") it takes the speed that 02_throughput measured, or an A100.
    """
    base, name = get_scale(scale), gpu or "A100"
    n_params, per_token = sizing.count_params(base.model), sizing.flops_per_token(base.model)
    done = runs.load_summary(runs.runs_folder(scale, runs_dir) / "02_throughput", {})
    if done and not gpu:
        speed, source = np.array([done["tokens_per_s"]]), "measured by 02_throughput"
        size, why = done["micro_batch"]["micro_batch"], source
    else:
        peak, gb = sizing.datasheet_peak(name), sizing.datasheet_peak(name, sizing.MEMORY_GB)
        if peak is None:
            known = ", ".join(sizing.MEMORY_GB)
            raise ValueError(f"gpu={name!r} is unknown; choose one of {known}, or 'A100 80GB'.")
        if said := re.search(r"(\d+) ?GB", name):
            gb = int(said[1])
        speed, source = MFU * peak / per_token, f"assumed: {name}, 40 to 60 % of its peak"
        size = sizing.fitting_micro_batch(base.model, base.train, gb * 1e9)
        why = f"computed for {gb} GB in eager mode; compiled needs less"
    tokens, per_step = speed * hours * 3600, base.train.n_sequences * base.model.seq_len
    optima = pd.concat(sizing.published_optima(n * per_token) for n in tokens)
    download, text = TEXT_GB.get(base.data.corpus, (0, 0))
    rows = [
        ("parameters", [n_params], "computed"),
        ("micro-batch that fits [sequences]", [size], why),
        ("speed [tokens/s]", speed, source),
        ("tokens", tokens, "computed"),
        ("steps", tokens / per_step, "computed"),
        ("tokens per parameter", tokens / n_params, "computed"),
        *((f"best size: {x}", n, "computed") for x, n in optima.groupby("source").n_params),
        ("download [GB]", [download], "assumed"),
        ("tokens on disk [GB]", [text], "assumed"),
        ("checkpoints and weights on disk [GB]", [DISK_BYTES * n_params / 1e9], "computed"),
    ]
    rows = [(what, " to ".join(map(short_number, values)), how) for what, values, how in rows]
    rows.append(("device that torch drives here", devices.device_name(), "measured"))
    return pd.DataFrame(rows, columns=["quantity", "value", "known"])
