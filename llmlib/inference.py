"""Use a finished run: load it, continue a prompt, score it, export it to Hugging Face's transformers.

What has been read stays in a cache of keys and values until the context is full.
"""

import codecs
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import tiktoken
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmlib import analysis, data, devices, runs
from llmlib.config import ModelConfig
from llmlib.data import END_OF_TEXT, load_tokenizer
from llmlib.model import LanguageModel, build_model
from llmlib.step import evaluate

CARD = """---
library_name: transformers
---
A Llama of {n_params:,} parameters, trained on {n_tokens:,} tokens by LLM Workbook's run {run}: {loss:.3f}
nats/token on held-out documents. llama.cpp knows the tokenizer gpt2; this one is {tokenizer}.
"""


def load_run(run: Path) -> tuple[LanguageModel, tiktoken.Encoding]:
    """Load the model and the tokenizer of a finished training run."""
    if runs.read_result(run) is None or not (run / "model.safetensors").exists():
        raise ValueError(
            f"run {str(run)!r} has no result.json or no weights: it is not finished (start it again), "
            "or one of a study, which keeps none."
        )
    model = build_model(runs.read_run(run).model)
    model.load_state_dict(load_file(run / "model.safetensors"))
    return model.to(devices.pick_device()).eval(), load_tokenizer(run / "tokenizer.json")


def continue_text(
    model: LanguageModel, encoding: tiktoken.Encoding, prompt: str, n_new: int = 200, **how: Any
) -> Iterator[str]:
    """Yield a prompt's continuation as text, whole characters only; ``how`` goes to ``generate``."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in generate(model, encoding, encoding.encode_ordinary(prompt), n_new, **how):
        yield decoder.decode(encoding.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


@torch.no_grad()
def generate(
    model: LanguageModel,
    encoding: tiktoken.Encoding,
    tokens: list[int],
    n_new: int,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> Iterator[int]:
    """Yield up to ``n_new`` tokens that continue ``tokens``; temperature 0 takes the likeliest.

    Stops at end of text; never picks a padding token. Whenever the context is full, the model
    forgets all but the last half of it and reads that anew.
    """
    if not (temperature >= 0 and top_k >= 1):
        raise ValueError(f"temperature={temperature}, top_k={top_k}: use 0 or more, 1 or more.")
    device, seq_len = model.embed_tokens.weight.device, model.config.seq_len
    rng = torch.Generator(device).manual_seed(seed)
    tokens = list(tokens) or [encoding.eot_token]
    unread, caches = tokens[-seq_len:], model.new_caches()
    for _ in range(n_new):
        if caches[0][0].size(2) + len(unread) > seq_len:
            unread, caches = tokens[-max(1, seq_len // 2) :], model.new_caches()
        logits = model.next_logits(torch.tensor([unread], device=device), caches)[0]
        chances = next_chances(logits[: encoding.n_vocab].float(), temperature, top_k)
        unread = torch.multinomial(chances, 1, generator=rng).tolist()
        if unread == [encoding.eot_token]:
            return
        tokens += unread
        yield unread[0]


def next_chances(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    """Give each token (V,) its probability among the ``top_k`` likeliest."""
    best, places = logits.topk(min(top_k, len(logits)) if temperature else 1)
    chances = torch.softmax(best / (temperature or 1.0), -1)
    return torch.zeros_like(logits).scatter(0, places, chances)


def score(model: Path, tokens_dir: Path) -> pd.DataFrame:
    """Score a finished run, or a Hugging Face folder, on all held-out documents, as training does.

    One row. A vocabulary that is not the tokens' is refused.
    """
    val = data.load_manifest(tokens_dir)["splits"]["val"]
    encoding = load_tokenizer(tokens_dir / "tokenizer.json")
    if (model / "tokenizer_config.json").exists():
        expected = _convert_tokenizer(encoding).get_vocab()
        scored, seq_len, vocabulary = load_hf(model)
    else:
        scored, theirs = load_run(model)
        seq_len, vocabulary = scored.config.seq_len, theirs._mergeable_ranks
        expected = encoding._mergeable_ranks
    if vocabulary != expected:
        raise ValueError(
            f"{str(model)!r} has another vocabulary than {str(tokens_dir)!r}; score it on tokens that "
            "01_data_prep made with its own tokenizer."
        )
    windows, device = data.eval_windows(tokens_dir, "val", seq_len), devices.pick_device()
    scores = evaluate(scored, windows, device, devices.compute_dtype(device))
    scores["bits_per_byte"] = analysis.bits_per_byte(scores["loss"], analysis.tokens_per_byte(val))
    return pd.DataFrame([scores | {"seq_len": seq_len, "val_sha256": data.sha256(windows)[:8]}])


def load_hf(folder: Path) -> tuple[Any, int, dict[str, int]]:
    """Load what ``evaluate`` needs of a Llama, its context length and its vocabulary."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if theirs.config.model_type != "llama":
        raise ValueError(f"model_type={theirs.config.model_type!r} in {folder} is not 'llama'.")
    theirs.to(devices.pick_device()).eval()
    model = SimpleNamespace(embed_tokens=theirs.get_output_embeddings())
    model.hidden = lambda tokens: theirs.model(tokens, use_cache=False).last_hidden_state
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return model, theirs.config.max_position_embeddings, tokenizer.get_vocab()


def export(run: Path, folder: Path) -> Path:
    """Write a finished run's Llama and its tokenizer to a new or empty folder, and return it."""
    if folder.is_file() or any(folder.glob("*")):
        raise ValueError(f"{str(folder)!r} exists and is not an empty folder; name a new one.")
    model, encoding = load_run(run)
    end, padding = encoding.eot_token, list(range(encoding.n_vocab, model.config.vocab_size))
    tokenizer = _convert_tokenizer(encoding, model_max_length=model.config.seq_len)
    theirs = hf_model(model.config, bos_token_id=end, eos_token_id=end)
    theirs.base_model.load_state_dict(model.state_dict())
    # padding rows of the embedding stand for no token
    theirs.generation_config.update(pad_token_id=end, suppress_tokens=padding or None)
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    result = runs.read_result(run)
    about = result | {"loss": result["val"]["loss"], "run": run.name, "tokenizer": encoding.name}
    runs.write_atomic(folder / "README.md", CARD.format(**about))
    return folder


def hf_model(config: ModelConfig, **special: Any) -> Any:
    """Build transformers' own Llama of the same shape; ``special`` goes to its config."""
    if config.arch != "llama":
        raise ValueError(f"arch={config.arch!r} cannot be exported; train with arch='llama'.")
    import transformers

    shape = {"vocab_size": config.vocab_size, "max_position_embeddings": config.seq_len}
    shape |= {"num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head}
    shape |= {"hidden_size": config.d_model, "intermediate_size": config.d_ff}
    shape |= {"rms_norm_eps": config.norm_eps, "tie_word_embeddings": True}
    shape |= {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **special))


def _convert_tokenizer(encoding: tiktoken.Encoding, **how: Any) -> Any:
    try:
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import TikTokenConverter
    except ImportError as error:
        raise ValueError('this needs transformers: pip install -e ".[export]"') from error
    if encoding.eot_token != len(encoding._mergeable_ranks):
        raise ValueError(
            f"tokenizer={encoding.name!r} cannot be exported; train with tokenizer='gpt2' or 'bpe'."
        )
    converter = TikTokenConverter(pattern=encoding._pat_str, extra_special_tokens=[END_OF_TEXT])
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks  # here, not in a file
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        split_special_tokens=True,  # in a text, their names are text, as they were in training
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        **how,
    )
