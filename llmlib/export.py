"""Export a run to a folder that Hugging Face's transformers loads as is.

Llamas become LlamaForCausalLM, the baseline GPT2LMHeadModel; both of our tokenizers become a
byte-level BPE of ``tokenizers``. Nothing here imports transformers: the formats are JSON.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import tiktoken
import torch
from safetensors.torch import load_file, save_file

from llmlib import checkpoint, runs
from llmlib.analysis import bits_per_byte
from llmlib.config import ModelConfig
from llmlib.tokenizer import END_OF_TEXT, byte_of_character, load_tokenizer

Tensors = dict[str, torch.Tensor]


def export(run: Path, folder: Path) -> Path:
    """Write a finished run's model, tokenizer and card to ``folder`` and return it.

    The files are written aside and their folder renamed, so that it is whole or not there.
    """
    run, folder = run.resolve(), folder.expanduser().resolve()
    if not (run / "training.json").exists():
        raise ValueError(
            f"run {str(run)!r} has no training.json, so it is not finished; run the command that "
            "started it again, or give the folder of a finished run."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} exists and is not an empty folder; name a new one.")
    config = ModelConfig(**runs.read_json(run / "config.json")["model"])
    encoding = load_tokenizer(run / "tokenizer.json")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        aside = Path(scratch, folder.name)
        aside.mkdir()
        _write_tokenizer(encoding, config.seq_len, aside)
        _write_model(load_file(run / "model.safetensors"), config, encoding, aside)
        runs.write_atomic(aside / "README.md", model_card(run, folder.name))
        os.replace(aside, folder)
    return folder


# ---------------------------------------------------------------------- the model


def _write_model(
    weights: Tensors, config: ModelConfig, encoding: tiktoken.Encoding, folder: Path
) -> None:
    convert = {"llama": _llama, "gpt2": _gpt2}[config.arch]
    tensors, shape = convert(weights, config)
    path = folder / "model.safetensors"
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata={"format": "pt"})
    checkpoint.sync(path)
    end_of_text = encoding.encode_single_token(END_OF_TEXT)
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    shape |= {"vocab_size": config.vocab_size, "tie_word_embeddings": True}
    runs.write_json(folder / "config.json", shape | {"torch_dtype": "float32"} | ends)
    path.chmod((folder / "config.json").stat().st_mode)  # safetensors keeps it to its owner
    padding = list(range(encoding.n_vocab, config.vocab_size))  # rows that stand for no token
    generation = ends | {"pad_token_id": end_of_text, "suppress_tokens": padding or None}
    runs.write_json(folder / "generation_config.json", generation)


def _llama(weights: Tensors, config: ModelConfig) -> tuple[Tensors, dict[str, Any]]:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {f"model.{name}": tensor for name, tensor in weights.items()}, {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # read by transformers 4
        "rope_parameters": rope,  # by 5
    }


def _gpt2(weights: Tensors, config: ModelConfig) -> tuple[Tensors, dict[str, Any]]:
    """Rename, transpose what transformers keeps as Conv1D, and add the biases we lack as zeros."""
    modules = {
        "embed_tokens": "wte",
        "embed_positions": "wpe",
        "norm": "ln_f",
        "layers": "h",
        "qkv_proj": "attn.c_attn",
        "o_proj": "attn.c_proj",
        "up_proj": "mlp.c_fc",
        "down_proj": "mlp.c_proj",
    }
    tensors = {}
    for name, tensor in weights.items():
        module = ".".join(modules.get(part, part) for part in name.split(".")[:-1])
        is_linear = "_proj." in name
        tensors[f"transformer.{module}.weight"] = tensor.T if is_linear else tensor
        if is_linear or tensor.dim() == 1:
            tensors[f"transformer.{module}.bias"] = torch.zeros(len(tensor))
    return tensors, {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": config.d_model,
        "n_inner": config.d_ff,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_positions": config.seq_len,
        "layer_norm_epsilon": config.norm_eps,
    } | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)


# ---------------------------------------------------------------------- the tokenizer


def _write_tokenizer(encoding: tiktoken.Encoding, seq_len: int, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if encoding.name not in ("gpt2", "bpe"):
        raise ValueError(
            f"tokenizer={encoding.name!r} cannot be exported; train with tokenizer='gpt2' or 'bpe'."
        )
    spell = {byte: character for character, byte in byte_of_character().items()}
    ranks = encoding._mergeable_ranks

    def spelt(word: bytes) -> str:
        return "".join(spell[byte] for byte in word)

    vocabulary = {spelt(word): rank for word, rank in ranks.items()} | encoding._special_tokens
    merges = [(spelt(left), spelt(right)) for left, right in merges_of(ranks)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    runs.write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # in a text, their names are text, as they were in training
    } | dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    runs.write_json(folder / "tokenizer_config.json", settings)


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Recover a BPE's merges: each word, encoded by the merges before its own, is two pieces."""
    merges = []
    for word in sorted((word for word in ranks if len(word) > 1), key=ranks.get):
        pieces = [word[i : i + 1] for i in range(len(word))]
        while len(pieces) > 2:
            pairs = [left + right for left, right in itertools.pairwise(pieces)]
            i = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
            pieces[i : i + 2] = [pairs[i]]
        merges.append((pieces[0], pieces[1]))
    return merges


# ---------------------------------------------------------------------- the card


def model_card(run: Path, name: str) -> str:
    """Describe a finished run in Markdown, with the front matter that the hub reads."""
    result, config = (runs.read_json(run / f"{file}.json") for file in ("training", "config"))
    model, train, val = config["model"], config["train"], result["val"]
    numbers = {
        "Parameters": f"{result['n_params']:,}",
        "Training tokens": f"{result['n_tokens']:,}",
        "Steps": f"{result['n_steps']:,} of {result['tokens_per_step']:,} tokens",
        "Training time": f"{sum(result['seconds'].values()) / 3600:.3g} hours",
        "Throughput": f"{result['tokens_per_s']:,.0f} tokens/s",
        "Validation loss": f"{val['loss']:.4f} nats/token",
        "Validation perplexity": f"{val['perplexity']:.2f}",
        "Next-token accuracy": f"{val['accuracy']:.4f}",
    }
    if tokens_per_byte := config.get("data", {}).get("val_tokens_per_byte"):
        numbers["Bits per byte"] = f"{bits_per_byte(val['loss'], tokens_per_byte):.4f}"
    rows = "\n".join(f"| {key} | {value} |" for key, value in numbers.items())
    return CARD.format(name=name, rows=rows, n_val_tokens=val["n_tokens"], **model, **train)


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A small language model ({arch}, {n_layer} layers x {d_model}, context {seq_len} tokens) trained from
scratch with LLM Workbook. It continues text and has had no instruction tuning.

| | |
|---|---|
{rows}

Scores are means over {n_val_tokens:,} held-out tokens, in windows of {seq_len}. Trained with {optimizer}
at a peak learning rate of {lr:g} and the `{schedule}` schedule, seed {seed}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50, do_sample=True)[0]))
```

In a text, `<|endoftext|>` is text like any other, as it was in training; the token itself, which starts
and ends documents, is `tokenizer.eos_token_id`.
"""
