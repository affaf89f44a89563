"""The plan's numbers against ones computed by hand; no test needs a GPU."""

import re
from itertools import chain

import pandas as pd
import pytest

from llmlib import runs, sizing, style
from llmlib.__main__ import make_plan
from llmlib.config import SCALES, override, recipe
from llmlib.sizing import WRITE_UP


def test_three_hours_of_an_a100_by_hand():
    """A token takes 6 x 179.96 M + 12 x 10 x 1024 x 512 = 1.1427 GFLOP, a step 131 072 tokens."""
    plan = make_plan("a100", 3.0, "A100 80GB").set_index("quantity")
    expected = {
        "parameters": "180M",
        "micro-batch that fits [sequences]": "128",
        "speed [tokens/s]": "109k to 164k",  # 0.4 and 0.6 x 312e12 / 1.1427e9
        "tokens": "1.18B to 1.77B",  # x 10 800 s
        "steps": "9k to 13.5k",
        "tokens per parameter": "6.55 to 9.83",
        "best size: 20 tokens per parameter": "106M to 130M",  # (1.348e18 / 120) ** 0.5
        "download [GB]": "24",
        "tokens on disk [GB]": "12",
        "checkpoints on disk [GB]": "6.48",  # 36 x 0.18
    }
    assert plan.value[list(expected)].to_dict() == expected
    assert plan.known.str.match("measured|computed|assumed").all()
    said = re.findall(
        r"(\d+) GB to download.*?(\d+) GB of tokens.*?([\d.]+) GB of checkpoints",
        (runs.ROOT / "README.md").read_text(),
        re.DOTALL,
    )
    assert said == [tuple(expected[name] for name in expected if "[GB]" in name)]
    small = make_plan("a100", 3.0, "A100").set_index("quantity").value  # of 40 GB
    assert small["micro-batch that fits [sequences]"] == "64"


def test_a_measured_speed_replaces_the_assumed_one(tmp_path):
    runs.write_json(tmp_path / "02_throughput" / "config.json", {"format": runs.FORMAT})
    found = {"tokens_per_s": 1e5, "micro_batch": {"micro_batch": 32, "grad_accum": 8}}
    runs.write_json(tmp_path / "02_throughput" / "summary.json", found)
    plan = make_plan("a100", 1.0, "", str(tmp_path)).set_index("quantity")
    assert plan.value["tokens"] == "360M" and plan.value["steps"] == "2.75k"
    assert plan.known["speed [tokens/s]"] == "measured by 02_throughput"
    other = make_plan("a100", 1.0, "L4", str(tmp_path)).set_index("quantity")
    assert other.known["speed [tokens/s]"].startswith("assumed: L4")


def test_a_card_without_a_datasheet_here_is_refused_by_name():
    with pytest.raises(ValueError, match=r"gpu='H100 NVL 94GB' is unknown; choose .* A10, .*L40S"):
        make_plan("a100", 3.0, "H100 NVL 94GB")


def test_every_card_with_a_peak_has_a_memory():
    for name in sizing.PEAK_BF16_FLOPS_PER_S:
        assert sizing.datasheet_peak(name, sizing.MEMORY_GB) >= 24


def test_readmes_table_of_cards_is_computed():
    readme, a100 = (runs.ROOT / "README.md").read_text(), SCALES["a100"]
    cards, sizes = re.findall(r"\| (?:card|micro-batch of) .*?((?:\| [\d /]+)+)\|", readme)
    cards, sizes = (row.strip("| ").split(" | ") for row in (cards, sizes))
    trains = [override(a100.train, **recipe(name, "a100")) for name in ("winner2024", "best")]
    for gb, shown in zip(cards, sizes, strict=True):
        fits = [sizing.fitting_micro_batch(a100.model, t, int(gb) * 1e9) for t in trains]
        assert shown == " / ".join(map(str, fits)), gb


def short(value):
    return style.short_number(value).replace("k", " k").replace("M", " M")


def test_readmes_results_are_those_of_the_records():
    readme, folder = (runs.ROOT / "README.md").read_text(), runs.ROOT / "runs"
    laptop = {p.parent.name: runs.read_json(p) for p in folder.glob("laptop/*/summary.json")}
    found, ends = laptop["04_recipe"]["found"], ("", "_low", "_high")
    muon = [row.values() for name, row in found.items() if name.startswith("Muon - AdamW, ")]
    numbers = [f"{-number:.3f}" for number in chain(*muon)]
    gap = "{difference:.2f} above tuned AdamW ({low:.2f} to {high:.2f})"
    numbers.append(gap.format(**found["winner2024 - AdamW, 2x128, 12 s"]))
    arms = pd.read_csv(folder / "laptop" / "04_recipe" / "figures" / "arms.csv")
    ends_of_arms = [f"{loss:.2f}" for loss in arms.groupby("arm").loss.mean()]
    numbers += ends_of_arms
    six = (runs.ROOT / "notebooks" / "06_loss_curves.ipynb").read_text()
    assert len(muon) == 4 and all(end in six for end in ends_of_arms)
    gains = pd.read_csv(folder / "laptop" / "04_recipe" / "figures" / "gain_by_size.csv")
    numbers += [
        f"{-row.difference:.2f} at {short(int(row.arm.replace(',', '')))}"
        for row in gains[gains["shape"].str.endswith("a parameter")].itertuples()
    ]
    deeper, wider = gains[gains["shape"] == "best"].difference
    numbers += [f"5 layers x 96 end {deeper:.2f} above 2 x 128", f"1 x 160 {-wider:.2f} below"]
    results = laptop["06_loss_curves"]["results"]
    numbers += [f"{row['loss']:.3f}" for row in results] + [f"{results[0]['bits_per_byte']:.3f}"]
    long = runs.read_json(folder / "laptop-long" / "03_sizing" / "summary.json")
    sizing_found, checks = laptop["03_sizing"], pd.DataFrame(long["held_out"])
    together = checks[(checks.method == "together") & (checks.from_times_to == 45)].iloc[0]
    for answer in (sizing_found["found"], long["found"], together):
        numbers += [short(answer[f"n_params{end}"]) for end in ends]
    numbers += [short(long["optima"][-1]["lowest_measured"])]
    numbers += [f"{checks[checks.method == 'one by one'].loss_error.iloc[-1]:.2f} nats too high"]
    missed = not sizing_found["held_out"][0]["n_params_covered"]
    assert ("missed its own check" in readme) == missed
    numbers += ["{loss:.3f} ({low:.3f} to {high:.3f})".format(**sizing_found["predicted_loss"])]
    numbers += [f"05 ended at {laptop['05_full_run']['val_of_03']:.3f}"]
    laptop_scale, [train, _] = SCALES["laptop"], laptop["01_data_prep"]["splits"]
    numbers += [f"{train['bytes'] / 1e6:.0f} MB of this machine's", f"{WRITE_UP[180e6]} nats/token"]
    numbers += [f"a BPE of {laptop_scale.data.bpe_vocab_size:,} tokens".replace(",", " ")]
    numbers += [f"{laptop_scale.model.n_layer} layers x {laptop_scale.model.d_model}"]
    assert [number for number in numbers if number not in " ".join(readme.split())] == []
