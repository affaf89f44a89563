"""Load a run's weights and continue a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import tiktoken
import torch
from safetensors.torch import load_file

from llmlib import runs
from llmlib.config import ModelConfig
from llmlib.model import LanguageModel, build_model
from llmlib.step import pick_device
from llmlib.tokenizer import END_OF_TEXT, load_tokenizer


def load_run(run: Path) -> tuple[LanguageModel, tiktoken.Encoding]:
    """Load the model and the tokenizer of a finished training run."""
    if not (run / "model.safetensors").exists():
        raise ValueError(
            f"run {str(run)!r} has no model.safetensors; give the folder of a finished run, such as "
            "runs/local/laptop/05_full_run."
        )
    model = build_model(ModelConfig(**runs.read_json(run / "config.json")["model"]))
    model.load_state_dict(load_file(run / "model.safetensors"))
    return model.to(pick_device()).eval(), load_tokenizer(run / "tokenizer.json")


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokens: list[int],
    n_new: int,
    *,
    n_vocab: int,
    end_of_text: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> Iterator[int]:
    """Yield up to ``n_new`` tokens that continue ``tokens``; temperature 0 takes the likeliest.

    Stops at end of text; sees the last ``seq_len`` tokens only; never picks a padding token.
    """
    device = next(model.parameters()).device
    rng = torch.Generator(device).manual_seed(seed)
    tokens = list(tokens) or [end_of_text]
    for _ in range(n_new):
        window = torch.tensor([tokens[-model.config.seq_len :]], device=device)
        logits = model(window)[0, -1, :n_vocab].float()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            best, places = logits.topk(min(top_k, n_vocab))
            chances = torch.softmax(best / temperature, -1)
            token = int(places[torch.multinomial(chances, 1, generator=rng)])
        if token == end_of_text:
            return
        tokens.append(token)
        yield token


def continue_text(
    model: LanguageModel, encoding: tiktoken.Encoding, prompt: str, n_new: int = 200, **how
) -> Iterator[str]:
    """Yield the continuation of a prompt as text, piece by piece, whole characters only."""
    how = {
        "n_vocab": encoding.n_vocab,
        "end_of_text": encoding.encode_single_token(END_OF_TEXT),
    } | how
    waiting = b""
    for token in generate(model, encoding.encode_ordinary(prompt), n_new, **how):
        waiting += encoding.decode_single_token_bytes(token)
        try:
            yield waiting.decode()
            waiting = b""
        except UnicodeDecodeError:
            continue
    if waiting:
        yield waiting.decode(errors="replace")
