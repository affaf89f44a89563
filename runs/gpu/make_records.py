"""Make the records of a GPU: make_records.py STEP --corpus FOLDER --out FOLDER, step by step

checks: tests marked gpu, steps beside fp32 ones, memory beside its estimate, no compiler. step: speed
and profile beside transformers' Llama. arms: three rates of `best`; then winner2024 and `best`, each
killed once and resumed. sizes: iso-time curves. figures: of both, and three hours extrapolated. A step
that was stopped goes on; none needs Jupyter. At ``--scale smoke`` they take a minute or so on a CPU.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch

from llmlib import analysis, bench, config, devices, isotime, launch, plots, prepare, runs
from llmlib import sizing, study

MINUTES = {"a100": (1.0, 4.0), "smoke": (0.02, 0.1)}  # of each rate, and of each arm
SIZES = ((6, 384), (8, 640), (12, 896), (14, 1280))  # 30 to 340 M parameters
PLANS = {"a100": study.Plan(SIZES, (20.0, 40.0, 80.0), 60.0), "smoke": study.PLANS["smoke"]}


def ten_steps(variant: bench.Variant) -> tuple[list[float], float]:
    """Take ten steps on one batch of random tokens; their losses, and the most memory [bytes]."""
    torch.manual_seed(0)
    timed = bench.TimedStep(variant)
    batch = timed.optimizer, timed.inputs, timed.targets
    how, take = timed.how | {"lr_factor": 0.1}, bench.step.train_step
    numbers = torch.stack([take(timed.model, *batch, **how) for _ in range(10)])
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else float("nan")
    return numbers[:, 0].tolist(), memory


class Records:
    """The steps, each a few tables in one folder; runs with weights go to another."""

    def __init__(self, scale: str, corpus: str, out: Path):
        base, self.scale, self.out = config.get_scale(scale, allow_cpu=scale == "smoke"), scale, out
        self.work = runs.ROOT / "runs" / "local" / f"gpu-{scale}"
        self.tokens_dir = self.work / "tokens"
        text = config.override(base.data, corpus=corpus or None)
        self.manifest = prepare.prepare(text, self.tokens_dir)
        self.base = config.fit_vocabulary(base, self.manifest["tokenizer"]["vocab_size"])
        self.record = runs.Record(out, {"device": devices.device_name(), "scale": scale})
        self.peak, self.model = sizing.datasheet_peak(devices.device_name()), self.base.model

    def recipe(self, name: str, **changes) -> config.TrainConfig:
        """Return a recipe in micro-batches that fit, changed."""
        train = config.override(self.base.train, **config.recipe(name, self.scale))
        size = sizing.fitting_micro_batch(self.model, train, devices.memory_bytes())
        return config.override(config.with_micro_batch(train, size), **changes)

    def checks(self) -> None:
        tests = [sys.executable, "-m", "pytest", "-m", "gpu"]
        output = subprocess.run(tests, cwd=runs.ROOT, capture_output=True, text=True).stdout
        runs.write_json(self.out / "tests.json", output.splitlines()[-1])
        rows, compiled = [], {"grad_accum": 2, "compile": True}
        for kind in (compiled | {"dtype": "float32", "compile": False}, compiled):
            for micro_batch in (8, 16):
                train = self.recipe("winner2024", **kind, micro_batch=micro_batch)
                losses, memory = bench.in_process(ten_steps, bench.Variant("", self.model, train))
                row = kind | {"micro_batch": micro_batch, "memory": memory}
                row["estimate"] = sizing.step_memory(self.model, train)
                rows.append(row | {f"loss {i}": loss for i, loss in enumerate(losses)})
        pd.DataFrame(rows).to_csv(self.out / "checks.csv", index=False)
        nowhere = str(self.work / "no-compiler")
        os.environ |= {"CC": "false", "CXX": "false", "TORCHINDUCTOR_CACHE_DIR": nowhere}
        result = self.train("no-compiler", self.recipe("best", budget_steps=3, compile=True))
        runs.write_json(self.out / "no_compiler.json", {"is_compiled": result["is_compiled"]})

    def step(self) -> None:
        rows = bench.variants(self.model, self.recipe("winner2024"), self.scale)
        size, turns = bench.SQUARES[self.scale], bench.TURNS[self.scale]
        peak = self.record.cached_json("peak", lambda: bench.matmul_peak(size))
        table = self.record.cached_table("step", lambda: bench.measure(rows, **turns))
        ours = table.tokens_per_s[0] * sizing.flops_per_token(self.model)
        mfu = {"of_measured_peak": ours / peak, "of_datasheet": self.peak and ours / self.peak}
        runs.write_json(self.out / "mfu.json", mfu)
        profile = bench.in_process(bench.profile_step, rows[0], 3)
        profile.to_csv(self.out / "profile.csv", index=False)

    def train(self, name: str, train: config.TrainConfig, *, dies: bool = False) -> dict:
        """Train to the end; a run that dies is killed once, at a third, and resumed."""
        run, ratio = self.work / name, analysis.tokens_per_byte(self.manifest["splits"]["val"])
        about = {"peak_flops_per_s": self.peak, "data": {"val_tokens_per_byte": ratio}}
        runs.create_run(run, self.model, train, self.tokens_dir, **about)
        process = launch.start([run]) if dies and runs.read_metrics(run).empty else None
        while process and process.poll() is None:
            seen = runs.read_metrics(run, "step", last=True)
            if len(seen) and seen.progress.iloc[-1] > 1 / 3:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.2)
        return launch.run_training(run)

    def arms(self) -> None:
        short, long = MINUTES[self.scale]
        best = self.recipe("best", budget_hours=short / 60)
        tries = {f"{x}": study.scaled(best, ("lr", "embed_lr"), x) for x in (0.5, 1.0, 2.0)}
        losses = {x: self.train(f"rate-{x}", train)["val"]["loss"] for x, train in tries.items()}
        arms = {"winner2024": self.recipe("winner2024"), "best": tries[min(losses, key=losses.get)]}
        results = {"losses of best by factor of its rates": losses}
        for name, train in arms.items():
            how = {"budget_hours": long / 60, "checkpoint_minutes": long / 8}
            results[name] = self.train(name, config.override(train, **how), dies=True)
        runs.write_json(self.out / "arms.json", results)

    def sizes(self) -> None:
        plan, train = PLANS[self.scale], self.recipe("best")
        shapes = study.size_settings(self.model, train, plan)
        variants = [bench.Variant(name, *shape) for name, shape in shapes.items()]
        turns = bench.TURNS[self.scale] | {"n_processes": 1}
        speeds = self.record.cached_table("speeds", lambda: bench.measure(variants, **turns))
        settings = study.iso_time_settings(shapes, speeds.set_index("name").tokens_per_s, plan)
        study.run_study(self.record, "sizes", settings, self.tokens_dir)

    def figures(self) -> None:
        found = {name: analysis.load_curve(self.work / name) for name in ("winner2024", "best")}
        curves = {name: analysis.smooth(curve, 0.025) for name, curve in found.items()}
        self.record.figure("arms", plots.compare_curves(curves), pd.concat(curves))
        points = study.iso_time_points(pd.read_csv(self.out / "sizes.csv"))
        (optima, _), together = isotime.find_optima(points), isotime.fit_together(points)
        self.record.figure("iso_time", plots.iso_time(points, optima, {}), optima)
        a100 = 10800.0 * sizing.PEAK_BF16_FLOPS_PER_S["A100"] / (self.peak or float("nan"))
        seconds = {"3 h here": 10800.0, "3 h of an A100, at equal MFU by datasheets": a100}
        told = {name: isotime.extrapolate(*together, t) for name, t in seconds.items()}
        runs.write_json(self.out / "three_hours.json", told)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("checks", "step", "arms", "sizes", "figures"))
    parser.add_argument("--corpus", default="", help="folder of SlimPajama-6B's parquet files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="of the records")
    parser.add_argument("--scale", default="a100", choices=PLANS)
    given = vars(parser.parse_args())
    getattr(Records(given["scale"], given["corpus"], given["out"]), given["step"])()
