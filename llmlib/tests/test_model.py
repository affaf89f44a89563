import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from llmlib.config import llama_config, resize
from llmlib.inference import hf_model
from llmlib.model import LOGITS_AT_ONCE, build_model, rope_table, rotate

LLAMA = llama_config(3, 64, d_head=16, vocab_size=320, seq_len=48, rope_theta=1000.0, norm_eps=1e-3)
GPT2 = resize(LLAMA, arch="gpt2")


@pytest.fixture(params=[LLAMA, GPT2], ids=lambda c: c.arch)
def model(request):
    return larger_weights(build_model(request.param, seed=1))


@pytest.fixture
def tokens():
    return torch.randint(320, (2, 48), generator=torch.Generator().manual_seed(0))


def larger_weights(model):
    """Scale the small initial weights up, so that a wrong detail shows in the logits."""
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(4.0) if param.dim() >= 2 else param.add_(0.3 * torch.randn_like(param))
    return model


@torch.no_grad()
def test_llama_logits_equal_transformers(tokens):
    ours, theirs = larger_weights(build_model(LLAMA)), hf_model(LLAMA).eval()
    theirs.base_model.load_state_dict(ours.state_dict())
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("n_rows", [1, 7, 32, 1000])  # of 96: the last chunk is smaller or all
def test_chunked_loss_and_its_gradients_are_those_of_cross_entropy(
    model, tokens, monkeypatch, n_rows
):
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", n_rows * 320)
    targets = tokens.roll(-1, 1)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    loss = model(tokens, targets)
    grads = torch.autograd.grad(2 * loss, list(model.parameters()))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, 2 * wanted, rtol=1e-3, atol=1e-6)


def test_chunked_loss_in_bf16_is_close_to_fp32(model, tokens):
    targets = tokens.roll(-1, 1)
    exact = model(tokens, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


def test_blocks_that_start_at_zero_add_nothing(tokens):
    model, usual = build_model(LLAMA, zero_init=True), build_model(LLAMA)
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(tokens), model.norm(model.embed_tokens(tokens)))
    queries = [m.layers[0].self_attn.q_proj.weight for m in (model, usual)]
    assert torch.equal(*queries)


@torch.no_grad()
def test_gpt2_logits_equal_transformers(tokens):
    ours = larger_weights(build_model(GPT2))
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=320, n_positions=48, n_embd=64, n_layer=3, n_head=4)
    ).eval()
    names = {"attn.c_attn": "qkv_proj", "attn.c_proj": "o_proj", "mlp.c_fc": "up_proj"}
    names |= {"mlp.c_proj": "down_proj", "ln_1": "ln_1", "ln_2": "ln_2"}  # theirs: ours
    weights = {"wte": ours.embed_tokens, "wpe": ours.embed_positions, "ln_f": ours.norm}
    for i, layer in enumerate(ours.layers):
        weights |= {f"h.{i}.{name}": getattr(layer, own) for name, own in names.items()}
    for name, param in theirs.transformer.named_parameters():
        module, _, kind = name.rpartition(".")
        own = weights[module].weight.T if "c_" in module else weights[module].weight
        param.copy_(own) if kind == "weight" else param.zero_()  # we have no biases
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_real_rope_equals_the_complex_formulation():
    seq_len, d_head = 40, 16
    x = torch.randn(2, 3, seq_len, d_head, dtype=torch.float64)
    frequency = 10_000.0 ** -(torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequency)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    rope = rope_table(seq_len, d_head, 10_000.0)
    assert torch.allclose(rotate(x, rope.double()), expected, atol=1e-5)


@torch.no_grad()
def test_no_token_sees_the_future(model, tokens):
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 320
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@torch.no_grad()
def test_reading_piece_by_piece_gives_the_logits_of_reading_at_once(model, tokens):
    at_once, caches, n_read = model(tokens[:1])[0], model.new_caches(), 0
    for n in (5, 1, 1, 9, 1, 31):
        logits = model.next_logits(tokens[:1, n_read : n_read + n], caches)
        n_read += n
        assert torch.allclose(logits[0], at_once[n_read - 1], atol=1e-4)
    assert n_read == model.config.seq_len


def test_initial_weights_follow_the_recipe():
    model = build_model(llama_config(8, 256, d_head=64, vocab_size=2048, seq_len=16))
    residual = 0.02 / math.sqrt(2 * 8)
    for name, param in model.named_parameters():
        if param.dim() < 2:
            assert (param == 1).all(), name
        else:
            expected = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert param.std().item() == pytest.approx(expected, rel=0.02), name


def test_same_seed_gives_the_same_weights_and_leaves_the_rng_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second, other = (build_model(LLAMA, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.embed_tokens.weight, second.embed_tokens.weight)
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)


def test_model_compiles_without_graph_breaks(model, tokens):
    """``backend="eager"`` traces the whole graph and generates no code: fast, and as strict."""
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    assert compiled(tokens, tokens).item() == pytest.approx(model(tokens, tokens).item(), rel=1e-6)


@torch.no_grad()
def test_norm_statistics_are_fp32_under_bf16(model, tokens):
    norms = [m for m in model.modules() if isinstance(m, nn.RMSNorm | nn.LayerNorm)]
    seen = []
    for norm in norms:
        norm.register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output]))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens)
    assert len(seen) == 2 * (2 * model.config.n_layer + 1)
    assert {x.dtype for x in seen} == {torch.float32}
