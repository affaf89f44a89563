"""What only a CUDA device can show: kernels, precision, memory, and a host that never waits."""

import gc

import pytest
import torch

from llmlib.bench import TimedStep, Variant
from llmlib.config import OPTIMIZERS, SCALES, TrainConfig, llama_config, override, resize
from llmlib.devices import compile_model
from llmlib.model import build_model
from llmlib.optim import build_optimizer
from llmlib.step import train_step
from llmlib.tests.conftest import SMOKE, losses, stop_after
from llmlib.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA, BF16, FP32 = torch.device("cuda"), torch.bfloat16, torch.float32
LLAMA = llama_config(2, 128, vocab_size=512, seq_len=128)
MODELS = {"llama": LLAMA, "gpt2": resize(LLAMA, arch="gpt2")}


def empty_device():
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@pytest.fixture(autouse=True)
def clean():
    """Every test begins with an empty device and full fp32 products, and leaves them behind."""
    torch.set_float32_matmul_precision("highest")
    empty_device()
    yield
    torch.set_float32_matmul_precision("highest")
    torch.cuda.set_sync_debug_mode("default")
    torch.compiler.reset()
    empty_device()


def setup(optimizer="adamw", arch="llama"):
    """A model on the device, its optimizer, and a batch of 16 sequences."""
    model = build_model(MODELS[arch], seed=0).to(CUDA)
    config = TrainConfig(optimizer=optimizer, lr=3e-3, micro_batch=8, grad_accum=2)
    tokens = torch.randint(512, (16, 129), generator=torch.Generator().manual_seed(0)).to(CUDA)
    return model, build_optimizer(model, config, BF16), tokens[:, :-1], tokens[:, 1:]


def take_steps(model, optimizer, inputs, targets, n, dtype=BF16):
    """Take steps on one batch; loss and gradient norm of each stay on the device."""
    how = {"micro_batch": 8, "lr_factor": 1.0, "grad_clip": 1.0, "dtype": dtype}
    return [train_step(model, optimizer, inputs, targets, **how) for _ in range(n)]


@pytest.mark.parametrize("arch", MODELS)
def test_model_compiles_to_one_graph_once(arch):
    model, optimizer, *batch = setup(arch=arch)
    fast = compile_model(model, CUDA)  # a graph break would be an error
    assert fast is not model
    take_steps(fast, optimizer, *batch, n=1)
    with torch.compiler.set_stance("fail_on_recompile"):
        take_steps(fast, optimizer, *batch, n=2)


def test_bf16_losses_follow_the_fp32_reference():
    found = {}
    for dtype in (FP32, BF16):
        model, optimizer, *batch = setup()
        fast = compile_model(model, CUDA) if dtype == BF16 else model
        numbers = take_steps(fast, optimizer, *batch, n=30, dtype=dtype)
        found[dtype] = torch.stack(numbers)[:, 0].cpu()
    assert found[FP32][-1] < found[FP32][0] - 0.5
    assert (found[BF16] - found[FP32]).abs().max() < 0.05


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_never_waits_for_the_device(name, compiles):
    model, optimizer, *batch = setup(name)
    fast = compile_model(model, CUDA) if compiles else model
    take_steps(fast, optimizer, *batch, n=2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    numbers = take_steps(fast, optimizer, *batch, n=11)  # Sophia's curvature is due every tenth
    with pytest.raises(RuntimeError, match="synchronizing"):
        numbers[0][0].item()
    torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(torch.stack(numbers)).all()


@pytest.mark.parametrize("optimizer", ["muon", "sophia"])
def test_resumed_run_matches_uninterrupted_run(make_run, optimizer):
    """Also where the device's random numbers matter: Sophia draws labels."""
    train = override(SMOKE.train, budget_steps=40, optimizer=optimizer)
    whole, parts = make_run(train), make_run(train)
    Trainer(whole).run()
    stop_after(Trainer(parts), 15)
    Trainer(parts).run()
    assert len(losses(whole)) == 40
    assert losses(parts) == pytest.approx(losses(whole), rel=2e-3)  # sums vary in order


def test_running_out_of_memory_halves_the_micro_batch(make_run):
    def train(micro_batch):
        empty_device()
        shape = {"budget_steps": 3, "grad_accum": 1, "n_evals": 1, "micro_batch": micro_batch}
        run = make_run(override(SMOKE.train, **shape))
        return run, Trainer(run).run(), torch.cuda.max_memory_reserved()

    _, _, half = train(1024)
    whole, _, full = train(2048)
    assert full > 1.5 * half
    total = torch.cuda.get_device_properties(CUDA).total_memory
    try:
        empty_device()
        torch.cuda.set_per_process_memory_fraction((half + full) / 2 / total)
        short, result, _ = train(2048)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result["micro_batch"] == 1024
    assert "out of memory: micro_batch is now 1024" in (short / "metrics.jsonl").read_text()
    assert losses(short) == pytest.approx(losses(whole), rel=2e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a100_step_fits_a_card_of_24_gb(optimizer):
    train = override(SCALES["a100"].train, micro_batch=32, grad_accum=2, optimizer=optimizer)
    assert TimedStep(Variant("ours", SCALES["a100"].model, train)).take(2) > 0
    assert torch.cuda.max_memory_reserved() < 24e9
