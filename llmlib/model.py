"""The compiled Llama, and the organisers' GPT-2 baseline beside it.

A model maps tokens (B, T) to logits (B, T, V), or straight to the mean cross-entropy [nats/token]
when it is given targets. Llama's module names are those of Hugging Face's LlamaForCausalLM, and RoPE
pairs features half a head apart as it does, so that weights move without permutation. Shapes are
static and RoPE is real-valued: it compiles without graph breaks. Llama: arXiv:2302.13971; RoPE:
arXiv:2104.09864; SwiGLU: arXiv:2002.05202; RMSNorm: arXiv:1910.07467.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from llmlib.config import LOGITS_AT_ONCE, ModelConfig

Cache = list[Tensor]  # keys and values (1, H, T, d_head) of the T tokens that a layer has read


class LanguageModel(nn.Module):
    """Blocks between an embedding and a head that share their weight."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, is_llama = config, config.arch == "llama"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        if is_llama:
            table = rope_table(config.seq_len, config.d_head, config.rope_theta)
            self.register_buffer("rope", table, persistent=False)
        else:
            self.embed_positions = nn.Embedding(config.seq_len, config.d_model)
        block = LlamaBlock if is_llama else GPT2Block
        self.layers = nn.ModuleList(block(config) for _ in range(config.n_layer))
        self.norm = new_norm(config)

    def hidden(self, tokens: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """Map tokens (B, T) to the normalised last hidden state (B, T, d_model).

        With caches (B = 1), the tokens follow those read before, and join them.
        """
        start = caches[0][0].size(2) if caches else 0
        here = slice(start, start + tokens.size(1))
        x, rope = self.embed_tokens(tokens), None
        if self.config.arch == "llama":
            rope = self.rope[:, here]
        else:
            x = x + self.embed_positions.weight[here]
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, caches and caches[i])
        return self.norm(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V), or the mean loss [nats/token] if targets (B, T) are given."""
        hidden, head = self.hidden(tokens), self.embed_tokens.weight
        if targets is None:
            return F.linear(hidden, head)
        return LinearCrossEntropy.apply(hidden.flatten(0, 1), head, targets.flatten())

    def next_logits(self, tokens: Tensor, caches: list[Cache]) -> Tensor:
        """Read tokens (B, T) after those in the caches; return the logits (B, V) of the next."""
        return F.linear(self.hidden(tokens, caches)[:, -1], self.embed_tokens.weight)

    def new_caches(self) -> list[Cache]:
        """Make one empty cache per layer, for a model that writes text."""
        like, config = self.embed_tokens.weight, self.config
        return [2 * [like.new_empty(1, config.n_head, 0, config.d_head)] for _ in self.layers]


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden (n, d_model) times head (V, d_model), without all logits at once.

    Each chunk of rows forms its gradients while its logits are at hand, so nothing is computed twice
    and memory never holds (n, V) logits (Liger, arXiv:2410.10989). Products run in the autocast data
    type; softmax, loss and sums are fp32.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        device, n = hidden.device.type, len(hidden)
        is_mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_mixed else head.dtype
        n_rows = 2 ** int(math.log2(max(LOGITS_AT_ONCE.get(device, 2**29) // len(head), 1)))
        with torch.autocast(device, enabled=False):
            low_head = head.to(dtype)
            losses, d_hidden, d_head = [], [], 0.0
            for x, y in zip(hidden.to(dtype).split(n_rows), targets.split(n_rows), strict=True):
                logits = (x @ low_head.t()).float()
                log_z = logits.logsumexp(-1, keepdim=True)
                losses.append((log_z - logits.gather(1, y[:, None])).sum())
                is_target = torch.arange(len(head), device=y.device) == y[:, None]
                d_logits = (((logits - log_z).exp() - is_target.float()) / n).to(dtype)
                d_hidden.append(d_logits @ low_head)
                d_head = d_head + (d_logits.t() @ x).float()
        ctx.save_for_backward(torch.cat(d_hidden).type_as(hidden), d_head)
        return torch.stack(losses).sum() / n

    @staticmethod
    def backward(ctx, d_loss: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_head = ctx.saved_tensors
        return d_loss * d_hidden, d_loss * d_head, None


def new_norm(config: ModelConfig) -> nn.Module:
    """Build RMSNorm for Llama, LayerNorm without bias for GPT-2; their input is fp32."""
    if config.arch == "llama":
        return nn.RMSNorm(config.d_model, config.norm_eps)
    return nn.LayerNorm(config.d_model, config.norm_eps, bias=False)


def rope_table(seq_len: int, d_head: int, theta: float) -> Tensor:
    """Cosines and sines of position times frequency (2, seq_len, d_head / 2), fp32."""
    frequency = theta ** -(torch.arange(0, d_head, 2, dtype=torch.float32) / d_head)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequency)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn feature pairs (i, i + d_head / 2) of x (B, H, T, d_head) by their position's angle."""
    (a, b), (cos, sin) = x.chunk(2, dim=-1), rope
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, cache: Cache | None) -> Tensor:
    """Causal attention (B, H, T, d_head): a token sees itself and all before it, cached or not."""
    if cache is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    cache[:] = k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
    n_new, n = q.size(2), k.size(2)
    sees = torch.ones(n_new, n, dtype=torch.bool, device=q.device).tril(n - n_new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees)


class LlamaBlock(nn.Module):
    """Attention with RoPE, then SwiGLU, each after an RMSNorm; no biases."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, d_ff, self.n_head = config.d_model, config.d_ff, config.n_head
        self.input_layernorm = new_norm(config)
        self.self_attn = nn.ModuleDict({f"{x}_proj": nn.Linear(d, d, bias=False) for x in "qkvo"})
        self.post_attention_layernorm = new_norm(config)
        wide = {f"{x}_proj": nn.Linear(d, d_ff, bias=False) for x in ("gate", "up")}
        self.mlp = nn.ModuleDict(wide | {"down_proj": nn.Linear(d_ff, d, bias=False)})

    def forward(self, x: Tensor, rope: Tensor, cache: Cache | None) -> Tensor:
        attn, normed = self.self_attn, self.input_layernorm(x)
        q, k, v = (
            rearrange(proj(normed), "b t (h d) -> b h t d", h=self.n_head)
            for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        y = attend(rotate(q, rope), rotate(k, rope), v, cache)
        x = x + attn.o_proj(rearrange(y, "b h t d -> b t (h d)"))
        mlp, normed = self.mlp, self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))


class GPT2Block(nn.Module):
    """A block of the organisers' baseline: LayerNorm, GELU, no biases, no RoPE."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, self.n_head = config.d_model, config.n_head
        self.ln_1, self.ln_2 = new_norm(config), new_norm(config)
        self.qkv_proj = nn.Linear(d, 3 * d, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)
        self.up_proj = nn.Linear(d, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, d, bias=False)

    def forward(self, x: Tensor, _: None, cache: Cache | None) -> Tensor:
        qkv = self.qkv_proj(self.ln_1(x))
        q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.n_head)
        x = x + self.o_proj(rearrange(attend(q, k, v, cache), "b h t d -> b t (h d)"))
        return x + self.down_proj(F.gelu(self.up_proj(self.ln_2(x)), approximate="tanh"))


@torch.no_grad()
def build_model(config: ModelConfig, *, seed: int = 0, zero_init: bool = False) -> LanguageModel:
    """Build a model on the CPU in fp32; the same seed gives the same weights.

    Matrices are drawn from N(0, 0.02), as GPT-2's, in the order of their names. Those that write to
    the residual stream get 0.02/sqrt(2 n_layer), or zero with ``zero_init``.
    """
    std_residual = 0.0 if zero_init else 0.02 / math.sqrt(2 * config.n_layer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LanguageModel(config)
        for name, param in model.named_parameters():
            if param.dim() >= 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                param.normal_(0.0, std_residual if is_residual else 0.02)
    return model
