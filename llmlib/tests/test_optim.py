"""Optimizers: who is in which group, and steps against torch's and against the papers' equations."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from llmlib import checkpoint, optim
from llmlib.config import OPTIMIZERS, ModelConfig, TrainConfig, resize
from llmlib.model import build_model
from llmlib.optim import Sophia, build_optimizer, orthogonalize, set_lr
from llmlib.step import train_step

SHAPE = {"vocab_size": 64, "seq_len": 16, "n_layer": 2, "n_head": 2, "d_model": 16}
LLAMA = ModelConfig(d_ff=32, **SHAPE)
MODELS = {"llama": LLAMA, "gpt2": resize(LLAMA, arch="gpt2", d_model=16)}
SETTINGS = {"micro_batch": 2, "grad_accum": 2, "lr": 3e-3, "betas": (0.9, 0.95)}


def build(optimizer, arch="llama", seed=1, dtype=torch.float32, **settings):
    model = build_model(MODELS[arch], seed=seed)
    config = TrainConfig(optimizer=optimizer, **SETTINGS | settings)
    return model, build_optimizer(model, config, dtype)


def batch(seed):
    tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def take_steps(model, optimizer, steps):
    for i in steps:
        settings = {
            "micro_batch": 2,
            "lr_factor": 1 / (1 + i),
            "grad_clip": 1.0,
            "dtype": torch.float32,
        }
        train_step(model, optimizer, *batch(i), **settings)


def take_steps_beside(ours, optimizer, theirs, *references):
    """Take the same steps at falling rates, on gradients that are drawn alike."""
    generator = torch.Generator().manual_seed(0)
    for factor in (1.0, 0.3, 0.03, 1.0):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for o in (optimizer, *references):
            set_lr(o, factor)
            o.step()


def split(model):
    """Return a model's hidden matrices, its other matrices and its vectors, found by their names."""
    params = dict(model.named_parameters())
    vectors = [p for name, p in params.items() if "norm" in name or "ln_" in name]
    embeddings = [p for name, p in params.items() if name.startswith("embed_")]
    hidden = [p for name, p in params.items() if name.endswith("_proj.weight")]
    assert len(vectors) + len(embeddings) + len(hidden) == len(params)
    return hidden, embeddings, vectors


def assert_close(ours, theirs, **tolerance):
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


# ------------------------------------------------------------------ groups and names


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_is_in_exactly_one_group_and_only_matrices_decay(name, arch):
    model, optimizer = build(name, arch, weight_decay=0.3)
    decay_of = [(p, g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
    assert len(decay_of) == len(list(model.parameters()))
    decay_of = {id(p): decay for p, decay in decay_of}
    hidden, embeddings, vectors = split(model)
    published = 0.2 if name == "sophia" else 0.3
    assert {decay_of[id(p)] for p in hidden + embeddings} == {published}
    assert {decay_of[id(p)] for p in vectors} == {0.0}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("arch", MODELS)
def test_hidden_matrices_embeddings_and_vectors_have_rates_of_their_own(arch, name):
    model, optimizer = build(name, arch, lr=2e-2, embed_lr=4e-3, vector_lr=1e-3)
    for factor in (1.0, 0.25):
        set_lr(optimizer, factor)
        lr_of = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        for params, peak in zip(split(model), (2e-2, 4e-3, 1e-3), strict=True):
            assert {lr_of[id(p)] for p in params} == {factor * peak}


def test_rates_that_are_not_given_are_that_of_the_hidden_matrices():
    _, optimizer = build("adamw", lr=2e-2)
    assert {group["peak_lr"] for group in optimizer.param_groups} == {2e-2}


# ------------------------------------------------------------------ all of them


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_optimizer_goes_on_as_if_nothing_had_happened(tmp_path, name):
    model, optimizer = build(name)
    take_steps(model, optimizer, range(8))
    checkpoint.write(tmp_path, *checkpoint.snapshot(model, optimizer), {"step": 8})
    other, its_optimizer = build(name, seed=2)
    checkpoint.restore(other, its_optimizer, checkpoint.newest_valid(tmp_path))
    for m, o in ((model, optimizer), (other, its_optimizer)):
        take_steps(m, o, range(8, 13))
    ours, theirs = checkpoint.snapshot(model, optimizer), checkpoint.snapshot(other, its_optimizer)
    for expected, found in zip(ours, theirs, strict=True):
        assert set(expected) == set(found)
        assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_never_reads_from_the_device(name):
    with FakeTensorMode():  # has no numbers to read
        model, optimizer = build(name)
        for _ in range(2):
            if getattr(optimizer, "hessian_is_due", False):
                optimizer.estimate_hessian(model, batch(0)[0], torch.float32)
            for p in model.parameters():
                p.grad = torch.randn(p.shape)
            optimizer.step()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns_a_batch_by_heart(name):
    model, optimizer = build(name, lr=1e-2)
    inputs, targets = batch(0)
    settings = {"micro_batch": 2, "lr_factor": 1.0, "grad_clip": 1.0, "dtype": torch.float32}
    losses = [train_step(model, optimizer, inputs, targets, **settings)[0] for _ in range(40)]
    assert losses[0] > 4.1
    assert losses[-1] < 2.5


# ------------------------------------------------------------------ AdamW


def test_adamw_steps_match_torchs_plain_loop():
    ours, optimizer = build("adamw", weight_decay=0.1)
    theirs = build_model(MODELS["llama"], seed=1)
    hidden, embeddings, vectors = split(theirs)
    reference = torch.optim.AdamW(
        [
            {"params": hidden + embeddings, "peak_lr": 3e-3},
            {"params": vectors, "weight_decay": 0.0, "peak_lr": 3e-3},
        ],
        betas=(0.9, 0.95),
        weight_decay=0.1,
        foreach=False,
        fused=False,
    )
    take_steps_beside(ours, optimizer, theirs, reference)
    assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------ Muon


@pytest.mark.parametrize("shape", [(3, 8, 24), (2, 24, 8), (4, 12, 12)])
def test_orthogonalize_applies_its_polynomial_to_the_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(matrices.double(), full_matrices=False)
    s /= s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    found = orthogonalize(matrices, torch.float32).double()
    torch.testing.assert_close(found, u @ s.diag_embed() @ vt, rtol=0, atol=1e-4)
    assert orthogonalize(torch.zeros(shape), torch.float32).count_nonzero() == 0


@pytest.mark.parametrize("arch", MODELS)
def test_muon_steps_match_torchs_with_adamw_beside_it(arch):
    bf16 = {"dtype": torch.bfloat16}  # as torch's always is
    ours, optimizer = build(
        "muon", arch, weight_decay=0.1, lr=6e-3, embed_lr=3e-3, vector_lr=1e-3, **bf16
    )
    theirs = build_model(MODELS[arch], seed=1)
    hidden, embeddings, vectors = split(theirs)
    muon = torch.optim.Muon(
        [{"params": hidden, "peak_lr": 6e-3}], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [
            {"params": embeddings, "peak_lr": 3e-3},
            {"params": vectors, "weight_decay": 0.0, "peak_lr": 1e-3},
        ],
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    start = build_model(MODELS[arch], seed=1)
    take_steps_beside(ours, optimizer, theirs, muon, adamw)
    ours_hidden, ours_embeddings, ours_vectors = split(ours)
    for p, q in zip(ours_embeddings + ours_vectors, embeddings + vectors, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    for p, q, before in zip(ours_hidden, hidden, split(start)[0], strict=True):
        moved, off = (q - before).norm(), (p - q).norm()
        assert moved > 0.01
        assert off < 0.02 * moved  # bf16 has three digits


# ------------------------------------------------------------------ Sophia


class PlainSophia(torch.optim.Optimizer):
    """Sophia-G as published: the squared gradient of a whole step, times ``bs`` in the update."""

    def __init__(self, params, beta1, beta2, rho, bs, weight_decay):
        super().__init__(params, {"lr": 0.0, "peak_lr": 3e-3})
        self.constants = beta1, beta2, rho, bs, weight_decay

    def update_hessian(self, grads):
        for p, g in zip(self.param_groups[0]["params"], grads, strict=True):
            b2 = self.constants[1]
            self.state[p]["h"] = b2 * self.state[p].get("h", 0) + (1 - b2) * g.double() ** 2

    @torch.no_grad()
    def step(self):
        b1, _, rho, bs, decay = self.constants
        for group in self.param_groups:
            for p in group["params"]:
                s, lr = self.state[p], group["lr"]
                s["m"] = b1 * s.get("m", 0) + (1 - b1) * p.grad.double()
                ratio = (s["m"].abs() / (rho * bs * s["h"] + 1e-15)).clamp(max=1)
                p *= 1 - lr * (decay if p.dim() == 2 else 0)
                p -= (lr * s["m"].sign() * ratio).float()


@pytest.mark.parametrize(
    ("name", "beta1", "beta2", "bs", "weight_decay"),
    [("sophia", 0.965, 0.99, 64, 0.2), ("sophia_writeup", 0.9, 0.95, 5120, 0.1)],
)
def test_sophia_steps_match_the_published_form(monkeypatch, name, beta1, beta2, bs, weight_decay):
    monkeypatch.setattr(optim, "draw", lambda logits, _: logits.argmax(-1))
    monkeypatch.setattr(Sophia, "HESSIAN_INTERVAL", 4)
    ours, optimizer = build(name, weight_decay=0.1)  # 4 sequences of 16: 64 tokens per step
    theirs = build_model(MODELS["llama"], seed=1)
    reference = PlainSophia(theirs.parameters(), beta1, beta2, 0.05, bs, weight_decay)
    for i in range(5):
        assert optimizer.hessian_is_due
        inputs, _ = batch(i)
        optimizer.estimate_hessian(ours, inputs, torch.float32)
        logits = theirs(inputs).flatten(0, 1)
        loss = F.cross_entropy(logits, logits.argmax(-1))
        reference.update_hessian(torch.autograd.grad(loss, list(theirs.parameters())))
        take_steps_beside(ours, optimizer, theirs, reference)  # four
    assert optimizer.n_hessian_passes == 5
    assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


class Softmax(nn.Module):
    """A linear softmax over V classes of inputs (n, 1) that look up features (d)."""

    def __init__(self, n, d, n_classes):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(n, d, generator=generator)
        self.weight = nn.Parameter(torch.randn(n_classes, d, generator=generator))

    def forward(self, inputs, targets=None):
        logits = self.features[inputs] @ self.weight.t()
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def test_gauss_newton_bartlett_estimate_is_right_on_average():
    n, n_draws = 6, 2000
    model = Softmax(n, 4, 5)
    optimizer = Sophia([{"params": [model.weight]}], lr=0.1, betas=(0.9, 0.0), rho=0.05)
    inputs = torch.arange(n)[:, None]
    mean = torch.zeros(5, 4)
    for _ in range(n_draws):
        optimizer.estimate_hessian(model, inputs, torch.float32)
        mean += optimizer.state[model.weight]["hessian"] / n_draws
        optimizer.count_step()
    hessian = (
        torch.autograd.functional.hessian(  # of a loss linear up to the softmax: Gauss-Newton's
            lambda w: F.cross_entropy(model.features @ w.t(), torch.zeros(n, dtype=torch.long)),
            model.weight.detach(),
        )
    )
    exact = hessian.flatten(2).flatten(0, 1).diag().view(5, 4)
    torch.testing.assert_close(mean, exact, rtol=0, atol=0.05 * exact.max().item())
    assert mean.sum().item() == pytest.approx(exact.sum().item(), rel=0.02)


def test_hessian_in_bf16_is_close_to_that_in_fp32(monkeypatch):
    _, labels = batch(1)
    monkeypatch.setattr(Sophia, "DRAWN_AT_ONCE", 4)
    monkeypatch.setattr(optim, "draw", lambda *_: labels)
    hessians = []
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = build("sophia")
        optimizer.estimate_hessian(model, batch(0)[0], dtype)
        hessians.append([optimizer.state[p]["hessian"] for p in model.parameters()])
    for full, low in zip(*hessians, strict=True):
        assert full.sum() > 0
        assert (low - full).norm() < 0.1 * full.norm()


def test_hessian_is_estimated_once_before_every_tenth_step():
    model, optimizer = build("sophia")
    due = []
    for i in range(21):
        due.append(optimizer.hessian_is_due)
        if due[-1]:
            optimizer.estimate_hessian(model, batch(0)[0][:2], torch.float32)
            assert not optimizer.hessian_is_due  # should the step be tried again
            assert all(p.grad is None for p in model.parameters())
        take_steps(model, optimizer, [i])
    assert [i for i, is_due in enumerate(due) if is_due] == [0, 10, 20]
    assert optimizer.n_hessian_passes == 3


def test_sophia_does_not_step_on_a_hessian_that_was_not_estimated():
    _, optimizer = build("sophia")
    with pytest.raises(AssertionError, match="estimate_hessian"):
        optimizer.step()


@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1.0])
def test_sophias_steps_are_clipped_and_the_unclipped_are_counted(scale):
    model, optimizer = build("sophia", lr=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.estimate_hessian(model, batch(0)[0], torch.float32)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape)
    optimizer.step()
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    moves = [
        (p - q * (1 - 1e-3 * decay[id(p)])).detach().flatten() / 1e-3
        for p, q in zip(model.parameters(), before, strict=True)
    ]
    moves = torch.cat(moves).abs()
    assert moves.max() < 1 + 1e-3
    expected = (moves < 1 - 1e-3).float().mean().item()
    assert optimizer.unclipped_share.item() == pytest.approx(expected, abs=0.01)
    assert {1e-12: expected > 0.9, 1e-5: 0.1 < expected < 0.9, 1.0: expected < 0.1}[scale]


def test_write_ups_sophia_clips_nearly_everything(monkeypatch):
    monkeypatch.setattr(Sophia, "HESSIAN_INTERVAL", 1)
    shares = {}
    for name in ("sophia", "sophia_writeup"):
        settings = {"micro_batch": 2**10, "grad_accum": 2**3, "betas": (0.965, 0.99)}
        model, optimizer = build(name, **settings)  # 2**17 tokens per step, as the winner's
        take_steps(model, optimizer, range(41))
        shares[name] = optimizer.unclipped_share.item()
    assert shares["sophia_writeup"] < 0.01 < shares["sophia"]


def test_drawn_labels_are_labels_whatever_the_logits():
    logits = torch.tensor([[0.0, 0.0, -math.inf], [-math.inf, 0.0, -math.inf], [math.nan] * 3])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([optim.draw(logits, generator) for _ in range(100)], dim=1)
    assert set(drawn[0].tolist()) == {0, 1}
    assert set(drawn[1].tolist()) == {1}
    assert drawn.max() < 3


class Broken(nn.Module):
    """A model in a wrapper, as for several processes, whose loss is not a number."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, inputs, targets):
        return self.module(inputs, targets) * math.nan


def test_hessian_that_is_not_finite_does_not_reach_the_weights():
    model, optimizer = build("sophia")
    optimizer.estimate_hessian(Broken(model), batch(0)[0], torch.float32)
    take_steps(model, optimizer, [0])
    assert all(p.isfinite().all() for p in model.parameters())
