"""Load a run's weights and continue a prompt, one token at a time.

Every token is read once: its keys and values stay in a cache until the context is full.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path

import tiktoken
import torch
from safetensors.torch import load_file
from torch import Tensor

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


def generate(
    model: LanguageModel,
    tokens: list[int],
    n_new: int,
    *,
    n_vocab: int,
    end_of_text: int,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield up to ``n_new`` tokens that continue ``tokens``; temperature 0 takes the likeliest.

    Stops at end of text; never picks a padding token (``n_vocab`` and above). The first new token
    sees up to ``seq_len`` tokens. Whenever these are full, the model forgets all but the last
    ``seq_len / 2`` and reads those anew, as if the text began there.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is negative; use 0 for the likeliest token.")
    if top_k < 1:
        raise ValueError(f"top_k={top_k} leaves no token to choose; use 1 or more.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is not a share of the chances; use above 0, up to 1.")
    rng = torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)

    def choose(logits: Tensor) -> int:
        logits = logits[:n_vocab].float()
        if temperature == 0:
            return int(logits.argmax())
        chances, places = likeliest(logits / temperature, top_k, top_p)
        return int(places[torch.multinomial(chances, 1, generator=rng)])

    return _generate(model, tokens or [end_of_text], n_new, end_of_text, choose)


def likeliest(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the chances, and the places in the vocabulary, of the tokens that may be drawn.

    These are the ``top_k`` likeliest, and of them the fewest whose chances reach ``top_p``.
    """
    best, places = logits.topk(min(top_k, len(logits)))
    chances = torch.softmax(best, -1)
    likelier = chances.cumsum(-1) - chances  # what all likelier tokens have together
    return chances * (likelier < top_p), places


@torch.no_grad()
def _generate(
    model: LanguageModel,
    tokens: list[int],
    n_new: int,
    end_of_text: int,
    choose: Callable[[Tensor], int],
) -> Iterator[int]:
    seq_len = model.config.seq_len
    tokens, unread, caches = list(tokens), tokens[-seq_len:], model.new_caches()
    for _ in range(n_new):
        if caches[0].n_tokens + len(unread) > seq_len:
            unread, caches = tokens[-max(1, seq_len // 2) :], model.new_caches()
        batch = torch.tensor([unread], device=model.embed_tokens.weight.device)
        token = choose(model.next_logits(batch, caches)[0])
        if token == end_of_text:
            return
        tokens.append(token)
        unread = [token]
        yield token


def continue_text(
    model: LanguageModel, encoding: tiktoken.Encoding, prompt: str, n_new: int = 200, **how
) -> Iterator[str]:
    """Yield a prompt's continuation as text, whole characters only; ``how`` goes to ``generate``."""
    end_of_text = encoding.encode_single_token(END_OF_TEXT)
    how |= {"n_vocab": encoding.n_vocab, "end_of_text": end_of_text}
    tokens = generate(model, encoding.encode_ordinary(prompt), n_new, **how)
    return _whole_characters(encoding, tokens)


def _whole_characters(encoding: tiktoken.Encoding, tokens: Iterator[int]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if piece := decoder.decode(encoding.decode_single_token_bytes(token)):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece
