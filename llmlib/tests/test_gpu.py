"""What only a CUDA device can show: kernels, precision, memory, and a host that never waits."""

import copy
import gc
import shutil

import numpy as np
import pytest
import torch

from llmlib import bench_model, checkpoint, runs
from llmlib.bench_model import Job
from llmlib.config import PRESETS, TrainConfig, gpt2_config, llama_config, override, to_json
from llmlib.export import export
from llmlib.model import build_model
from llmlib.optim import OPTIMIZERS, build_optimizer
from llmlib.step import Reading, compile_model, train_step
from llmlib.train import Stopped, Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA, BF16, FP32 = torch.device("cuda"), torch.bfloat16, torch.float32
SHAPE = {"n_layer": 2, "d_model": 128, "vocab_size": 512, "seq_len": 128}
MODELS = {"llama": llama_config(**SHAPE), "gpt2": gpt2_config(n_head=2, **SHAPE)}
SMOKE = PRESETS["smoke"]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Every test begins with an empty device and full fp32 products, and leaves them behind."""
    monkeypatch.delenv("LLMLIB_DTYPE", raising=False)
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")
    torch.cuda.set_sync_debug_mode("default")
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def setup(optimizer="adamw", arch="llama", lr=3e-3):
    """A model on the device, its optimizer, and a batch of 16 sequences."""
    model = build_model(MODELS[arch], seed=0).to(CUDA)
    config = TrainConfig(optimizer=optimizer, lr=lr, micro_batch=8, grad_accum=2)
    tokens = torch.randint(512, (16, 129), generator=torch.Generator().manual_seed(0)).to(CUDA)
    return model, build_optimizer(model, config), tokens[:, :-1], tokens[:, 1:]


def take_steps(model, optimizer, inputs, targets, n, dtype=BF16):
    """Take steps on one batch; the losses stay on the device."""
    settings = {"micro_batch": 8, "lr": 3e-3, "grad_clip": 1.0, "dtype": dtype}
    return [train_step(model, optimizer, inputs, targets, **settings)[0] for _ in range(n)]


@pytest.mark.parametrize("arch", MODELS)
def test_model_compiles_to_one_graph_once(arch):
    from torch._dynamo.utils import counters

    model, optimizer, *batch = setup(arch=arch)
    counters.clear()
    fast = compile_model(model, CUDA)
    assert fast is not model
    take_steps(fast, optimizer, *batch, n=2)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        take_steps(fast, optimizer, *batch, n=2)


def test_bf16_losses_follow_the_fp32_reference():
    reference, compiled = [], []
    for losses, dtype in ((reference, FP32), (compiled, BF16)):
        model, optimizer, *batch = setup()
        fast = compile_model(model, CUDA) if dtype == BF16 else model
        losses += [float(loss) for loss in take_steps(fast, optimizer, *batch, n=30, dtype=dtype)]
    assert reference[-1] < reference[0] - 0.5
    assert np.abs(np.subtract(compiled, reference)).max() < 0.05


@pytest.mark.parametrize(
    ("name", "tolerance"), [("adamw", 1e-4), ("ademamix", 1e-4), ("muon", 0.05)]
)
def test_optimizers_move_weights_as_on_the_cpu(name, tolerance):
    """Muon's products are in bf16 on the device."""
    moved = []
    for device in ("cpu", CUDA):
        model = build_model(MODELS["llama"], seed=0)
        before = copy.deepcopy(model.state_dict())
        model.to(device)
        optimizer = build_optimizer(model, TrainConfig(optimizer=name, lr=1e-3))
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            optimizer.step()
        moved.append({k: v.cpu() - before[k] for k, v in model.state_dict().items()})
    for key, reference in moved[0].items():
        difference = (moved[1][key] - reference).norm() / reference.norm()
        assert difference < tolerance, key


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_never_waits_for_the_device(name, compiles):
    model, optimizer, *batch = setup(name)
    fast = compile_model(model, CUDA) if compiles else model
    take_steps(fast, optimizer, *batch, n=2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    losses = take_steps(
        fast, optimizer, *batch, n=11
    )  # Sophia looks at the curvature at every tenth
    reading = Reading(*losses)
    with pytest.raises(RuntimeError, match="synchronizing"):
        losses[0].item()
    torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(reading.get()).all()


def trainer(run, tokens, model=SMOKE.model, **changes):
    train = override(SMOKE.train, **changes)
    runs.write_json(run / "config.json", {"model": to_json(model), "train": to_json(train)})
    return Trainer(run, model, train, tokens)


def losses_of(run):
    steps = runs.read_metrics(run).query("kind == 'step'")
    assert steps.step.tolist() == list(range(1, len(steps) + 1))
    return steps.loss.to_numpy()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_matches_uninterrupted_run(tmp_path, smoke_tokens, optimizer):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(whole, smoke_tokens, budget_steps=40, optimizer=optimizer).run()
    first = trainer(parts, smoke_tokens, budget_steps=40, optimizer=optimizer)
    first.must_stop = lambda: "tested" if first.progress.step == 15 else None
    with pytest.raises(Stopped):
        first.run()
    trainer(parts, smoke_tokens, budget_steps=40, optimizer=optimizer).run()
    assert len(losses_of(whole)) == 40
    np.testing.assert_allclose(losses_of(parts), losses_of(whole), rtol=2e-3)  # sums vary in order


def test_checkpoint_brings_back_state_and_random_numbers_of_the_device(tmp_path):
    model, optimizer, *batch = setup()
    take_steps(model, optimizer, *batch, n=2)
    torch.rand(3, device=CUDA)
    path = checkpoint.write(tmp_path, *checkpoint.snapshot(model, optimizer), {"step": 2})
    drawn, weights = torch.rand(4, device=CUDA), copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    take_steps(model, optimizer, *batch, n=2)
    checkpoint.restore(model, optimizer, path)
    assert torch.equal(torch.rand(4, device=CUDA), drawn)
    torch.testing.assert_close(dict(model.state_dict()), dict(weights), rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], moments, rtol=0, atol=0)


def test_running_out_of_memory_halves_the_micro_batch(tmp_path, smoke_tokens):
    shape = {"budget_steps": 3, "grad_accum": 1, "n_evals": 1}
    reserved = {}
    for micro_batch in (1024, 2048):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run = tmp_path / f"{micro_batch}"
        trainer(run, smoke_tokens, micro_batch=micro_batch, **shape).run()
        reserved[micro_batch] = torch.cuda.max_memory_reserved()
    assert reserved[2048] > 1.5 * reserved[1024]
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(sum(reserved.values()) / 2 / total)
        short = tmp_path / "short"
        result = trainer(short, smoke_tokens, micro_batch=2048, **shape).run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result["micro_batch"] == 1024
    assert "out of memory: micro_batch is now 1024" in (short / "metrics.jsonl").read_text()
    np.testing.assert_allclose(losses_of(short), losses_of(tmp_path / "2048"), rtol=2e-3)


def test_exported_model_gives_the_same_logits_on_the_device(tmp_path, smoke_tokens):
    transformers = pytest.importorskip("transformers")
    run = tmp_path / "run"
    ours = trainer(run, smoke_tokens, budget_steps=2)
    shutil.copy(smoke_tokens / "tokenizer.json", run)
    ours.run()
    folder = export(run, tmp_path / "exported")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).to(CUDA).eval()
    tokens = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0)).to(CUDA)
    with torch.no_grad():
        expected = ours.model(tokens)
        torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a100_step_fits_a_card_of_24_gb(optimizer):
    train = override(PRESETS["a100"].train, micro_batch=32, grad_accum=2, optimizer=optimizer)
    torch.cuda.reset_peak_memory_stats()
    stage = bench_model.Stage(Job("ours", PRESETS["a100"].model, train))
    assert stage.turn(2) > 0
    assert torch.cuda.max_memory_reserved() < 24e9
    assert np.isfinite(float(stage.step(*stage.batch)))
