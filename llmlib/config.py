"""What a run is made of: frozen dataclasses, three presets, JSON in and out.

Every value is checked when its dataclass is built, so a mistake costs a second and not an hour.
Nothing here imports torch; how the numbers are used is the business of the other modules.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Any, Literal

SECONDS_PER_HOUR = 3600.0


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} is not positive; give a number above 0.")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. The defaults are the recipe that won LauzHack 2024."""

    arch: Literal["llama", "gpt2"] = "llama"
    vocab_size: int = 50_304  # padded to a multiple of 64 [tokens]
    seq_len: int = 512  # context length [tokens]
    n_layer: int = 10
    n_head: int = 16
    d_model: int = 1024
    d_ff: int = 2816  # SwiGLU hidden width (GPT-2: the MLP's hidden width)
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.arch not in ("llama", "gpt2"):
            raise ValueError(f"arch={self.arch!r} is unknown; choose 'llama' or 'gpt2'.")
        _positive(self, "vocab_size", "seq_len", "n_layer", "n_head", "d_model", "d_ff")
        if self.d_model % self.n_head:
            nearest = min(
                (n for n in range(1, self.d_model + 1) if self.d_model % n == 0),
                key=lambda n: abs(n - self.n_head),
            )
            rounded = round(self.d_model / self.n_head) * self.n_head
            raise ValueError(
                f"d_model={self.d_model} is not divisible by n_head={self.n_head}; "
                f"try n_head={nearest} or d_model={rounded}."
            )
        if self.arch == "llama" and self.d_head % 2:
            raise ValueError(
                f"d_head={self.d_head} (d_model/n_head) is odd; RoPE turns pairs of features, "
                f"so try n_head={self.n_head // 2 or 1}."
            )

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_head


def llama_config(n_layer: int, d_model: int, *, d_head: int = 64, **shape: Any) -> ModelConfig:
    """Build a Llama of the given depth and width; the SwiGLU width is 8/3 d_model, rounded up."""
    multiple = 256 if d_model >= 512 else 64
    d_ff = -(-8 * d_model // (3 * multiple)) * multiple
    return ModelConfig(
        n_layer=n_layer, d_model=d_model, n_head=max(1, d_model // d_head), d_ff=d_ff, **shape
    )


def gpt2_config(**shape: Any) -> ModelConfig:
    """Build the organisers' GPT-2 baseline (123.6 M parameters unless the shape is changed)."""
    base = {"n_layer": 12, "n_head": 12, "d_model": 768}
    shape = base | shape
    return ModelConfig(arch="gpt2", d_ff=shape.pop("d_ff", 4 * shape["d_model"]), **shape)


def resize(
    model: ModelConfig, *, arch: str, n_layer: int | None = None, d_model: int | None = None
) -> ModelConfig:
    """Change architecture, depth or width, keeping head width, vocabulary and context.

    GPT-2 in place of the recipe's Llama, with no shape given, is the organisers' 12 x 768.
    """
    if arch == model.arch and n_layer is None and d_model is None:
        return model
    base = gpt2_config() if arch == "gpt2" and model == ModelConfig() else model
    n_layer, d_model = n_layer or base.n_layer, d_model or base.d_model
    shared = {"vocab_size": model.vocab_size, "seq_len": model.seq_len}
    if arch == "gpt2":
        n_head = max(1, d_model // base.d_head)
        return gpt2_config(n_layer=n_layer, d_model=d_model, n_head=n_head, **shared)
    return replace(llama_config(n_layer, d_model, d_head=base.d_head, **shared), arch=arch)


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    corpus: str = "DKYoon/SlimPajama-6B"  # hub id, folder, file, or "stdlib"
    subset: str | None = None  # hub configuration name
    revision: str | None = None  # hub commit, tag or branch
    tokenizer: str = "gpt2"  # a tiktoken name, or "bpe": train one on the corpus
    bpe_vocab_size: int = 4096  # used by "bpe" only [tokens]
    n_tokens: int | None = None  # stop after the shard that reaches this many [tokens]
    test_size: float = 0.0005  # share of train documents held out (the organisers' split)
    split_seed: int = 2357

    def __post_init__(self) -> None:
        _positive(self, "n_tokens", "bpe_vocab_size", "test_size")
        if self.test_size >= 1:
            raise ValueError(f"test_size={self.test_size} leaves nothing to train on; use 0.0005.")
        if self.bpe_vocab_size < 257:
            raise ValueError(
                f"bpe_vocab_size={self.bpe_vocab_size} is too small; a byte-level BPE needs "
                "256 bytes and one end-of-text token, so 257 or more."
            )


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. Exactly one of the three budgets is given."""

    budget_hours: float | None = 3.0
    budget_tokens: int | None = None
    budget_steps: int | None = None
    micro_batch: int = 64  # sequences per forward pass
    grad_accum: int = 4  # forward passes per step
    optimizer: str = "adamw"
    lr: float = 1.25e-3
    matrix_lr: float | None = None  # Muon's, for hidden matrices; None: lr
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1  # on matrices only
    grad_clip: float | None = 1.0  # largest gradient norm; None: no clipping
    schedule: str = "one_cycle"
    warmup: float = 0.05  # share of the budget
    final_lr: float = 0.1  # share of lr left on the last step
    cooldown: float = 0.5  # share of the budget, for "wsd" only
    zero_init: bool = False  # blocks start by adding nothing: output projections at zero
    seed: int = 0
    n_evals: int = 20  # validations over the whole budget
    eval_sequences: int = 1024  # at most so many, always the same
    eval_all: bool = True  # the final validation takes the whole split
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 2  # newest ones kept, beside the best
    align_documents: bool = False  # start training windows at documents where possible
    compile: bool = True
    tracker: str | None = None  # "tensorboard": a copy of the metrics for it
    snapshot_steps: tuple[int, ...] = ()  # steps whose checkpoints are kept for cool-downs
    start_from: str | None = None  # a snapshot of another run whose weights and optimizer go on

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "snapshot_steps", tuple(self.snapshot_steps))
        budgets = {k: getattr(self, k) for k in ("budget_hours", "budget_tokens", "budget_steps")}
        given = [k for k, v in budgets.items() if v is not None]
        if len(given) != 1:
            raise ValueError(
                f"{given or 'no budget'} given; give exactly one of {', '.join(budgets)}."
            )
        _positive(self, *budgets, "micro_batch", "grad_accum", "lr", "matrix_lr", "grad_clip")
        _positive(self, "n_evals", "eval_sequences", "checkpoint_minutes", "keep_checkpoints")
        for name in ("warmup", "cooldown"):
            if not 0 <= (share := getattr(self, name)) < 1:
                raise ValueError(f"{name}={share} is not a share of the budget; use 0 to 0.99.")

    @property
    def budget_seconds(self) -> float | None:
        return None if self.budget_hours is None else self.budget_hours * SECONDS_PER_HOUR


# 04's two recipes: the hackathon winner's, but for its two faults, and the best found since. Peak
# rates are tuned at "laptop"; at "a100" the winner's is its own and the other is not yet measured.
RECIPES: dict[str, dict[str, Any]] = {
    "winner2024": {
        "optimizer": "adamw",
        "betas": (0.9, 0.95),
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "schedule": "one_cycle",
        "warmup": 0.05,
        "final_lr": 0.1,
        "zero_init": False,
    },
    "best": {
        "optimizer": "muon",
        "betas": (0.9, 0.95),
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "schedule": "linear",
        "warmup": 0.05,
        "final_lr": 0.0,
        "zero_init": True,
    },
}
RECIPE_LR = {
    "winner2024": {"smoke": 3e-3, "laptop": 1e-3, "a100": 1.25e-3},
    "best": {"smoke": 3e-3, "laptop": 1e-2, "a100": 2e-3},
}


def recipe(name: str, scale: str) -> dict[str, Any]:
    """Look up a recipe as changes to a scale's TrainConfig."""
    if name not in RECIPES:
        raise ValueError(f"recipe={name!r} is unknown; choose one of {', '.join(RECIPES)}.")
    return RECIPES[name] | {"lr": RECIPE_LR[name][scale]}


@dataclass(frozen=True)
class Preset:
    """A scale: the data, the model and the training that fit one kind of machine."""

    scale: str
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    minutes: dict[str, float] = field(default_factory=dict)  # expected of the longer notebooks


PRESETS = {
    "smoke": Preset(
        scale="smoke",
        data=DataConfig(corpus="stdlib", tokenizer="bpe", bpe_vocab_size=512, n_tokens=200_000),
        model=llama_config(2, 64, d_head=32, vocab_size=512, seq_len=64),
        train=TrainConfig(
            budget_hours=None,
            budget_steps=20,
            micro_batch=8,
            grad_accum=2,
            **recipe("winner2024", "smoke"),
            n_evals=2,
            eval_sequences=64,
            compile=False,
        ),
    ),
    "laptop": Preset(
        scale="laptop",
        data=DataConfig(corpus="stdlib", tokenizer="bpe", bpe_vocab_size=4096, test_size=0.05),
        model=llama_config(2, 128, d_head=32, vocab_size=4096, seq_len=256),
        train=TrainConfig(
            budget_hours=0.05,
            micro_batch=8,
            grad_accum=1,
            **recipe("winner2024", "laptop"),
            n_evals=10,
            eval_sequences=48,
            checkpoint_minutes=0.5,
        ),
        minutes={
            "01_data_prep": 0.7,
            "02_throughput": 4.9,
            "03_sizing": 2.4,
            "04_recipe": 3.4,
            "05_full_run": 3.3,
        },
    ),
    "a100": Preset(
        scale="a100",
        data=DataConfig(),
        model=ModelConfig(),
        train=TrainConfig(**recipe("winner2024", "a100")),
    ),
}


def preset(scale: str) -> Preset:
    """Look up a scale by name."""
    if scale not in PRESETS:
        raise ValueError(f"scale={scale!r} is unknown; choose one of {', '.join(PRESETS)}.")
    return PRESETS[scale]


def override(config: Any, **changes: Any) -> Any:
    """Return the config with the changes that are not None; unknown names are refused.

    Giving one of the budgets replaces the budget that was there.
    """
    changes = {k: v for k, v in changes.items() if v is not None}
    known = {f.name for f in dataclasses.fields(config)}
    if unknown := sorted(set(changes) - known):
        raise ValueError(
            f"{unknown[0]!r} is not a setting; choose from {', '.join(sorted(known))}."
        )
    if any(k.startswith("budget_") for k in changes):
        changes = {"budget_hours": None, "budget_tokens": None, "budget_steps": None} | changes
    return replace(config, **changes)


def cut(train: TrainConfig, micro_batch: int | None) -> TrainConfig:
    """Take a step's sequences in micro-batches of this size, if one is given; tokens per step stay."""
    n_sequences = train.micro_batch * train.grad_accum
    size = train.micro_batch if micro_batch is None else micro_batch
    if size < 1 or n_sequences % size:
        raise ValueError(
            f"micro_batch={size} does not divide a step's {n_sequences} sequences; give a divisor."
        )
    return replace(train, micro_batch=size, grad_accum=n_sequences // size)


def to_json(config: Any) -> dict[str, Any]:
    """Turn a config into plain JSON types."""
    return {
        k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()
    }
