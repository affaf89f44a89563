"""One step and one validation against direct computations."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmlib.config import ModelConfig
from llmlib.devices import compile_model
from llmlib.model import build_model
from llmlib.step import EVAL_BATCH, evaluate, train_step

CONFIG = ModelConfig(
    vocab_size=128, seq_len=16, n_layer=2, n_head=2, d_model=32, d_ff=64, norm_eps=1e-5
)
CPU, FP32 = torch.device("cpu"), torch.float32


def setup(lr=0.1, n_sequences=12):
    model = build_model(CONFIG, seed=0)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "peak_lr": 1.0}], lr=lr)
    tokens = torch.randint(128, (n_sequences, 17), generator=torch.Generator().manual_seed(0))
    return model, optimizer, tokens[:, :-1], tokens[:, 1:]


def step(model, optimizer, inputs, targets, **changes):
    settings = {"micro_batch": 4, "lr_factor": 0.1, "grad_clip": 1e9, "dtype": FP32} | changes
    return train_step(model, optimizer, inputs, targets, **settings)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("micro_batch", [1, 4, 5, 12, 100])  # 5: a smaller last one
def test_accumulated_gradient_is_that_of_one_big_batch(micro_batch):
    model, optimizer, inputs, targets = setup()
    reference = copy.deepcopy(model)
    logits = reference(inputs)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected.backward()
    loss, norm = step(model, optimizer, inputs, targets, micro_batch=micro_batch)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert norm == pytest.approx(gradients(reference).norm().item(), rel=1e-5)
    torch.testing.assert_close(gradients(model), gradients(reference), rtol=1e-4, atol=1e-7)


def test_step_goes_down_the_clipped_gradient():
    model, optimizer, inputs, targets = setup()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    _, norm = step(model, optimizer, inputs, targets, grad_clip=0.05, lr_factor=0.2)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert norm > 0.05  # as it was before clipping
    assert (after - before).norm().item() == pytest.approx(0.2 * 0.05, rel=1e-4)
    torch.testing.assert_close(after - before, -0.2 * gradients(model), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_step_that_is_not_finite_takes_no_gradient_and_says_so(where):
    model, optimizer, inputs, targets = setup()
    if where == "loss":
        broken = lambda x, y: model(x, y) * math.inf  # noqa: E731
        broken.named_parameters = model.named_parameters
    else:
        broken = model
        model.norm.weight.register_hook(lambda grad: grad * math.nan)
    before = copy.deepcopy(model.state_dict())
    loss, norm = step(broken, optimizer, inputs, targets)
    assert not np.isfinite([loss, norm]).all()
    assert math.isfinite(loss) == (where == "gradient")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_parameter_that_no_gradient_reaches_is_named():
    model, optimizer, inputs, targets = setup()
    model.norm.weight.requires_grad_(False)
    with pytest.raises(AssertionError, match=r"no gradient reached \['norm\.weight'\]"):
        step(model, optimizer, inputs, targets)


def test_processes_average_gradients_on_the_last_micro_step_only(monkeypatch):
    class Shared(torch.nn.Sequential):
        """Looks like a model that processes share, and notes when they do not average."""

        noted = ""

        @contextlib.contextmanager
        def no_sync(self):
            self.noted += "("
            yield
            self.noted += ")"

        def forward(self, *batch):
            self.noted += "."
            return self[0](*batch)

    monkeypatch.setattr("llmlib.step.DistributedDataParallel", Shared)
    model, optimizer, inputs, targets = setup()
    shared = Shared(model)
    step(shared, optimizer, inputs, targets, micro_batch=3)
    assert shared.noted == "(.)(.)(.)."


def test_evaluation_weighs_every_token_the_same():
    model, _, _, _ = setup()
    n = EVAL_BATCH + 3  # batches of unequal size
    windows = np.random.default_rng(0).integers(128, size=(n, 17))
    result = evaluate(model, windows, CPU, FP32)
    tokens = torch.from_numpy(windows)
    with torch.no_grad():
        log_p = model(tokens[:, :-1]).double().log_softmax(-1)
    expected = -log_p.gather(-1, tokens[:, 1:, None]).mean().item()
    hits = (log_p.argmax(-1) == tokens[:, 1:]).double().mean().item()
    assert result["loss"] == pytest.approx(expected, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert result["accuracy"] == pytest.approx(hits)
    assert result["n_tokens"] == n * 16


def test_compiled_bf16_step_equals_the_uncompiled_one():
    """On any processor: one without bf16 units emulates them, slowly at other sizes than these."""
    numbers = []
    for compiles in (False, True):
        model, optimizer, *batch = setup()
        fast = compile_model(model, CPU) if compiles else model
        taken = [
            step(fast, optimizer, *batch, lr_factor=1.0, dtype=torch.bfloat16) for _ in range(3)
        ]
        numbers.append(torch.stack(taken))
    plain, compiled = numbers
    assert plain[0, 0] - plain[2, 0] > 0.1  # it learns
    torch.testing.assert_close(compiled, plain, rtol=0.02, atol=0.0)  # bf16 has 8 bits
