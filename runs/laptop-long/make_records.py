"""Make the long study behind notebook 04: make_records.py PART

"recipe" tunes every optimizer, judges the arms and builds `best` from ingredients. It found AdamW's
best rate for the norm gains a hundred times above where Muon's search had begun, so "refine" begins
Muon's there too. The parts "growth..." ask whether Muon's gain holds as models grow and train for
longer, "longer" judges AdamW and Muon with 40 s for each run, "one_rate" asks what the winner's
AdamW does with its one rate tuned, "depth" whether wider models beat deeper ones of as many
parameters. A part that was stopped goes on from its tables below this folder; another commit,
processor or corpus is refused. (03_sizing is notebook 03 with parameters of its own.) NorMuon,
cautious decay, momentum warm-up, a power-law cool-down, averaged weights and what 04_candidates
tried gained nothing and are gone from llmlib and from here; the commits that the tables name have
them.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

from llmlib import bench, config, data, prepare, runs, study
from llmlib.sizing import count_params

HERE, SECONDS = Path(__file__).parent, 12.0
BASE = config.fit_vocabulary(config.get_scale("laptop"), 4096)
SHAPES = {"1x32": (1, 32), "1x64": (1, 64), "1x96": (1, 96), "2x128": (2, 128)}
SHAPES |= {"1x160": (1, 160), "5x96": (5, 96)}  # as many parameters as 2x128, within 3 %
SHAPES |= {"1x224": (1, 224)}
MAIN, SECOND = "2x128", "1x64"
DEPTHS = ("5x96", "2x128", "1x160")
WINNERS = {"winner2024 as published": {"schedule": "one_cycle_unfinished"}, "winner2024": {}}
WINNERS = {name: config.override(BASE.train, **changes) for name, changes in WINNERS.items()}
IMPROVED = {"AdamW": "AdamW tuned", "Muon": "best"}
FIELDS = (("lr",), ("embed_lr",), ("vector_lr",), ("micro_batch",), ("lr",))
Names = tuple[tuple[str, ...], ...]
RATES = {"lr": 2e-3, "embed_lr": 1e-2, "vector_lr": 2e-3}
STARTS = {  # of the searches
    "AdamW": RATES,
    "Muon": {"optimizer": "muon", "lr": 1e-2, "embed_lr": 2e-2, "vector_lr": 1e-2},
    "Sophia as published": RATES | {"optimizer": "sophia", "lr": 1e-3},
    "Sophia of the write-up": {"optimizer": "sophia_writeup", "lr": 1.25e-3},
}
TO_ZERO = {  # schedules; of those that gain, the best
    "decay to zero": {"final_lr": 0.0},
    "linear to zero": {"schedule": "linear", "final_lr": 0.0},
    "cool-down of 85 %": {"schedule": "wsd", "cooldown": 0.85, "final_lr": 0.0},
    "cool-down of 50 %": {"schedule": "wsd", "final_lr": 0.0},
}
CANDIDATES = TO_ZERO | {
    "zero-initialised projections": {"zero_init": True},
    "embedding without decay": {"embed_decay": 0.0},
}


def shaped(shape: str, train: config.TrainConfig) -> study.Setting:
    n_layer, d_model = SHAPES[shape]
    return config.resize(BASE.model, arch="llama", n_layer=n_layer, d_model=d_model), train


def step_name(model: config.ModelConfig, train: config.TrainConfig) -> str:
    optimizer = train.optimizer.removesuffix("_writeup")
    return f"{model.n_layer}x{model.d_model} {optimizer}, batch {train.micro_batch}"


KINDS = [{"optimizer": o} for o in ("adamw", "muon", "sophia")]
KINDS += [{"micro_batch": n} for n in (1, 2, 4, 16)]
LONGER_KINDS = [*KINDS[:2], *KINDS[3:], *({"micro_batch": n} for n in (32, 64, 128))]


class Study:
    """A record of runs; each gets the tokens that its speed, measured before all, buys in SECONDS."""

    def __init__(self, name: str, *shapes: str, kinds=KINDS, seconds: float = SECONDS):
        self.seconds = seconds
        self.tokens_dir = HERE.parent / "local" / "laptop-long" / "tokens"
        if not (self.tokens_dir / "manifest.json").exists():
            prepare.prepare(BASE.data, self.tokens_dir)
        about = {key: runs.environment()[key] for key in ("commit", "processor", "n_threads")}
        windows = data.eval_windows(self.tokens_dir, "val", BASE.model.seq_len)
        self.record = runs.Record(
            HERE / name, about | {"seconds": seconds, "val_sha256": data.sha256(windows)}
        )
        settings = [shaped(s, config.override(BASE.train, **k)) for s in shapes for k in kinds]
        steps = [bench.Variant(step_name(*setting), *setting) for setting in settings]
        if steps:
            turns = {"n_processes": 1, "n_rounds": 3, "n_steps": 10}
            self.record.cached_table("speeds", lambda: bench.measure(steps, **turns))
        table = pd.read_csv(HERE / (name if steps else "04_recipe") / "speeds.csv")
        n_tokens = table.micro_batch * BASE.model.seq_len
        self.step_seconds = dict(zip(table.name, n_tokens / table.tokens_per_s, strict=True))

    def speed(self, model: config.ModelConfig, train: config.TrainConfig) -> float:
        """Return tokens/s: AdamW's step of this batch, and what the optimizer takes more at 8."""
        at_8 = replace(train, micro_batch=8)
        adamw = [replace(t, optimizer="adamw") for t in (train, at_8)]
        own, less, more = (self.step_seconds[step_name(model, t)] for t in (*adamw, at_8))
        return train.micro_batch * model.seq_len / (own + more - less)

    def train(self, name: str, arms: study.Settings, seeds=(0,), share=1.0) -> pd.DataFrame:
        """Train arms with all seeds; rows of the named table."""
        settings = {
            label: study.in_time(setting, self.speed(*setting), share * self.seconds)
            for label, setting in study.repeated(arms, seeds).items()
        }
        return study.run_study(self.record, name, settings, self.tokens_dir)

    def search(self, start: config.TrainConfig, coordinates: Names, shape: str = MAIN):
        """Find the best rates of an arm at a shape."""
        train_all = partial(self.train, f"tuning_{shape}")
        return study.search(train_all, shaped(shape, start), coordinates)

    def improve(
        self, name: str, base: config.TrainConfig, changes: dict[str, dict]
    ) -> tuple[dict, dict]:
        """Screen single changes at one size and confirm those that gain at another.

        Returns the changes that gain beyond noise at both: all together, and what undoes each.
        """
        at = {MAIN: base, SECOND: self.search(base, (("lr", "embed_lr"),), SECOND)}
        gains = list(changes)
        for shape, seeds in ((MAIN, (1, 2)), (SECOND, (1, 2, 3))):
            tries = {"base": shaped(shape, at[shape])}
            for gain in gains:
                tries[gain] = shaped(shape, config.override(at[shape], **changes[gain]))
            table = self.train(f"ingredients_{name}_{shape}", tries, seeds)
            found = study.differences(table, "base").sort_values("difference")
            gains = found.arm[found.high < 0].tolist()
            best_schedule = [gain for gain in gains if gain in TO_ZERO][:1]
            gains = [gain for gain in gains if gain not in TO_ZERO or gain in best_schedule][:4]
        together = {key: value for gain in gains for key, value in changes[gain].items()}
        return together, {g: {key: getattr(base, key) for key in changes[g]} for g in gains}


def recipe() -> None:
    """Tune, screen, confirm, leave one out, compare."""
    part, one_by_one = Study("04_recipe", MAIN, SECOND), FIELDS[:3]
    arms = dict(WINNERS)
    for name, start in STARTS.items():
        own = FIELDS if name in IMPROVED else one_by_one if "embed_lr" in start else FIELDS[:1]
        arms[name] = part.search(config.override(BASE.train, **start), own)
    arms["Sophia, rho tuned"] = part.search(arms["Sophia as published"], (("rho",), ("lr",)))
    for base, name in IMPROVED.items():
        together, undo = part.improve(base.lower(), arms[base], CANDIDATES)
        arms[name] = part.search(config.override(arms[base], **together), one_by_one[:2])
        runs.write_json(part.record.path / f"{name}.json", config.to_json(arms[name]))
        for shape in (MAIN, SECOND) if name == "best" and undo else ():
            whole = part.search(arms[name], (("lr", "embed_lr"),), shape)
            tries = {"whole": shaped(shape, whole)}
            tries |= {f"without {g}": shaped(shape, replace(whole, **u)) for g, u in undo.items()}
            part.train(f"leave_one_out_{shape}", tries, (4, 5, 6))
    arms_at = {MAIN: arms, SECOND: {}}
    for name in (*IMPROVED, *IMPROVED.values()):
        arms_at[SECOND][name] = part.search(arms[name], (("lr", "embed_lr"),), SECOND)
    for shape, found in arms_at.items():
        part.train(f"arms_{shape}", {k: shaped(shape, v) for k, v in found.items()}, range(11, 16))
    finals = {name: shaped(MAIN, arms[name]) for name in IMPROVED.values()}
    for share in (0.25, 0.5):  # the whole is among the arms
        part.train(f"budget_{share:g}", finals, (11, 12, 13), share)


def refine() -> None:
    """Search Muon's rate of the norm gains from above, and judge what it and the last part gave."""
    part, before = Study("04_refine"), read_arm("04_recipe", "best")
    above = part.search(replace(before, vector_lr=0.16), (("vector_lr",),))
    changes = {"faster norm gains": {"vector_lr": above.vector_lr}}
    changes["embedding without decay"] = {"embed_decay": 0.0}
    together, _ = part.improve("muon", before, changes)
    best = replace(before, **together)
    runs.write_json(part.record.path / "best.json", config.to_json(best))


def read_arm(part: str, name: str) -> config.TrainConfig:
    values, known = runs.read_json(HERE / part / f"{name}.json"), config.TrainConfig().__dict__
    return config.TrainConfig(**{key: value for key, value in values.items() if key in known})


def growth(
    name: str = "04_growth",
    shapes: tuple[str, ...] = ("1x32", "1x96"),
    ratio: int = 5,
    batch_of: tuple[str, ...] = ("AdamW tuned", "best"),
    near: dict[str, str] | None = None,
) -> None:
    """Compare AdamW and Muon at equal tokens per parameter (ratio), each tuned anew at each size.

    Both rates are searched anew, and the batch of the arms in batch_of. The searches begin at the
    optima of the first growth study's shape that is near, or at the arms' starts.
    """
    part = Study(name)
    starts = {"AdamW tuned": STARTS["AdamW"] | {"vector_lr": 0.256}, "best": STARTS["Muon"] | {"lr": 5e-3}}
    for shape in shapes:
        n_tokens = ratio * count_params(shaped(shape, BASE.train)[0])
        part.speed = lambda *_, n=n_tokens: n / SECONDS

        def tune(arm: str, shape: str = shape) -> study.Setting:
            start = config.override(BASE.train, **starts[arm])
            if near:
                rows = pd.read_csv(HERE / "04_growth" / "growth.csv")
                row = rows[rows.run.str.startswith(f"{near[shape]} {arm}")].iloc[0]
                found = {key: float(row[key]) for key in RATES} | {"micro_batch": int(row.micro_batch)}
                start = config.override(start, **found)
            train_all = partial(part.train, f"tuning_{arm}_{shape}")
            coordinates = (("lr",), ("embed_lr",), *[("micro_batch",)] * (arm in batch_of))
            return shaped(shape, study.search(train_all, shaped(shape, start), coordinates))

        with ThreadPoolExecutor() as pool:  # both at once
            found = dict(zip(starts, pool.map(tune, starts), strict=True))
        part.train("growth", {f"{shape} {k}": v for k, v in found.items()}, (21, 22, 23))


def growth_wide() -> None:
    """Growth at 1.5 M parameters; Muon keeps the batch of 0.5 M."""
    growth("04_growth_wide", ("1x224",), batch_of=("AdamW tuned",), near={"1x224": "1x96"})


def growth_longer() -> None:
    """Growth at ten tokens per parameter; both arms keep their batches of five."""
    same = {"1x32": "1x32", "1x96": "1x96"}
    growth("04_growth_longer", (*same,), ratio=10, batch_of=(), near=same)


def longer() -> None:
    """Tune AdamW and Muon, try the schedules and judge both again, with 40 s for each run."""
    part = Study("04_longer", MAIN, SECOND, kinds=LONGER_KINDS, seconds=40.0)
    arms_at = {MAIN: {"winner2024": BASE.train}, SECOND: {}}
    for name, old in {"AdamW": ("04_recipe", "AdamW tuned"), "Muon": ("04_refine", "best")}.items():
        tuned = part.search(read_arm(*old), FIELDS)
        together, _ = part.improve(name.lower(), tuned, TO_ZERO)
        arms_at[MAIN][name] = replace(tuned, **together)
        coordinates = (("lr", "embed_lr"), ("micro_batch",), ("lr",))
        arms_at[SECOND][name] = part.search(arms_at[MAIN][name], coordinates, SECOND)
    for shape, arms in arms_at.items():
        part.train(f"arms_{shape}", {k: shaped(shape, v) for k, v in arms.items()}, range(11, 16))


def depth() -> None:
    """Try the write-up's claim, wider beats deeper, at equal parameters and equal time."""
    part = Study("04_depth", *DEPTHS, kinds=[{}, {"optimizer": "muon"}], seconds=20.0)
    for name, train in {"winner2024": BASE.train, "best": read_arm("04_refine", "best")}.items():
        part.train(f"depth_{name}", {shape: shaped(shape, train) for shape in DEPTHS}, (41, 42, 43))


def one_rate() -> None:
    """Tune the winner's recipe in its one rate, and judge it beside AdamW with rates of its own."""
    part, adamw = Study("04_one_rate"), config.recipe("adamw", "laptop")
    arms = {"AdamW": config.override(BASE.train, **adamw), "winner2024": BASE.train}
    arms["AdamW, one rate"] = part.search(BASE.train, (("lr",),))
    part.train(f"one_rate_{MAIN}", {k: shaped(MAIN, v) for k, v in arms.items()}, range(11, 16))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("recipe", "refine", "longer", "growth", "growth_wide", "growth_longer", "one_rate")
    parser.add_argument("part", choices=(*parts, "depth"))
    globals()[parser.parse_args().part]()
