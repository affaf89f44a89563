"""Exported folders, loaded by transformers, against our own model, sampler and tokenizers."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llmlib import runs, sample
from llmlib.__main__ import main
from llmlib.config import PRESETS, ModelConfig, gpt2_config, llama_config, override, to_json
from llmlib.export import export, merges_of
from llmlib.model import build_model
from llmlib.tokenizer import END_OF_TEXT, save_tokenizer, train_bpe
from llmlib.train import Trainer

PIECES = ["def f(x):\n    return x ** 2\n", "the cat's hat", "naïve café", "你好，世界", "Ελληνικά"]
PIECES += [
    "👩‍👩‍👧‍👦😀",
    "é",
    "3.14159 1234567",
    "\n\n\n",
    "   ",
    "\t\t",
    " \n ",
    "\r\n",
    "\xa0\u3000",
]
PIECES += [
    "we'll they're I'M",
    "!?...",
    "\x00\x7f",
    "\ufeff\u200b",
    " ",
    "a" * 30,
    END_OF_TEXT,
    "<|",
]

LLAMA = llama_config(2, 64, d_head=16, vocab_size=448, seq_len=48, rope_theta=500.0)
GPT2 = gpt2_config(n_layer=2, d_model=64, n_head=4, d_ff=96, vocab_size=448, seq_len=48)


def varied_texts(n: int) -> list[str]:
    pick = random.Random(0)
    return PIECES + ["".join(pick.choices(PIECES, k=pick.randint(0, 9))) for _ in range(n)]


@pytest.fixture(scope="module")
def bpe() -> tiktoken.Encoding:
    return train_bpe(varied_texts(300), 400)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, smoke_tokens: Path) -> Path:
    """A real run of two steps."""
    run = tmp_path_factory.mktemp("trained")
    model, train = PRESETS["smoke"].model, override(PRESETS["smoke"].train, budget_steps=2)
    record = {"model": to_json(model), "train": to_json(train)}
    runs.write_json(run / "config.json", record)
    shutil.copy(smoke_tokens / "tokenizer.json", run)
    Trainer(run, model, train, smoke_tokens).run()
    return run


@pytest.fixture
def make_finished(
    tmp_path: Path, trained: Path
) -> Callable[[ModelConfig, tiktoken.Encoding], Path]:
    """Return a function that makes a run with weights so large that wrong details would show."""

    def make(config: ModelConfig, encoding: tiktoken.Encoding) -> Path:
        run = tmp_path / "run"
        model = build_model(config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for param in model.parameters():
                noise = torch.randn(param.shape, generator=generator)
                param.mul_(4.0) if param.dim() >= 2 else param.add_(0.3 * noise)
        record = runs.read_json(trained / "config.json") | {"model": to_json(config)}
        runs.write_json(run / "config.json", record)
        shutil.copy(trained / "training.json", run)
        runs.write_atomic(run / "tokenizer.json", save_tokenizer(encoding))
        save_file(model.state_dict(), run / "model.safetensors")
        return run

    return make


@pytest.mark.parametrize("name", ["bpe", "gpt2"])
def test_both_tokenizers_give_the_same_ids(name, request, make_finished, tmp_path):
    encoding = request.getfixturevalue(name)
    config = llama_config(1, 16, d_head=16, vocab_size=50_304, seq_len=32)
    theirs = AutoTokenizer.from_pretrained(export(make_finished(config, encoding), tmp_path / "x"))
    texts = varied_texts(3000)
    expected = [encoding.encode_ordinary(text) for text in texts]
    assert theirs(texts).input_ids == expected
    assert [theirs.decode(tokens) for tokens in expected] == texts
    assert len(theirs) == encoding.n_vocab
    assert theirs.model_max_length == 32


def test_end_of_text_is_a_token_only_where_it_is_meant(bpe, make_finished, tmp_path):
    theirs = AutoTokenizer.from_pretrained(export(make_finished(LLAMA, bpe), tmp_path / "x"))
    end = bpe.encode_single_token(END_OF_TEXT)
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == end
    assert theirs.bos_token == theirs.eos_token == END_OF_TEXT
    assert end not in theirs(f"a{END_OF_TEXT}b").input_ids
    assert end in theirs(f"a{END_OF_TEXT}b", split_special_tokens=False).input_ids
    assert theirs.decode([end], skip_special_tokens=True) == ""


def test_merges_recovered_from_gpt2s_ranks_are_the_published_ones(gpt2):
    spelling = bytes_to_unicode()
    files = (path.read_text() for path in Path(os.environ["TIKTOKEN_CACHE_DIR"]).iterdir())
    published = next(text for text in files if text.startswith("#version")).splitlines()[1:]
    merges = [
        " ".join("".join(spelling[byte] for byte in piece) for piece in pair)
        for pair in merges_of(gpt2._mergeable_ranks)
    ]
    assert merges == published


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=lambda c: c.arch)
@torch.no_grad()
def test_exported_model_computes_and_writes_as_ours(config, bpe, make_finished, tmp_path):
    run = make_finished(config, bpe)
    theirs, found = AutoModelForCausalLM.from_pretrained(
        export(run, tmp_path / "x"), output_loading_info=True
    )
    assert not any(found.values())  # nothing missing, unexpected or of another shape
    assert theirs.dtype == torch.float32
    ours, encoding = sample.load_run(run)
    ours.cpu()  # where theirs is
    tokens = torch.randint(400, (2, 48), generator=torch.Generator().manual_seed(0))
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4

    end = encoding.encode_single_token(END_OF_TEXT)
    for prompt in ("the cat", "naïve ", "\n\n1234", "你好"):
        start = encoding.encode_ordinary(prompt)
        written = theirs.generate(torch.tensor([start]), max_new_tokens=30)[0, len(start) :]
        how = {"n_vocab": encoding.n_vocab, "end_of_text": end, "temperature": 0}
        expected = list(sample.generate(ours, start, 30, **how))
        assert written.tolist() == expected + [end] * (len(expected) < 30)


def test_rope_theta_is_where_transformers_4_and_5_look(bpe, make_finished, tmp_path):
    config = runs.read_json(export(make_finished(LLAMA, bpe), tmp_path / "x") / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0


@torch.no_grad()
def test_exported_model_never_writes_a_padding_token(bpe, make_finished, tmp_path):
    run = make_finished(LLAMA, bpe)
    weights = load_file(run / "model.safetensors")
    weights["embed_tokens.weight"][400:] = 10 * weights["norm.weight"].sign()
    save_file(weights, run / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "x"))
    tokens = torch.arange(40)[None]
    favourites = theirs(tokens).logits.argmax(-1)
    assert (favourites >= 400).any()  # padding would win if it were allowed
    for n in (favourites[0] >= 400).nonzero().flatten().tolist():
        assert theirs.generate(tokens[:, : n + 1], max_new_tokens=1)[0, -1] < 400


def test_export_needs_no_transformers(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails
    files = list(export(trained, tmp_path / "x").iterdir())
    assert len({path.stat().st_mode for path in files}) == 1  # whoever reads one reads all
    names = {path.name for path in files}
    assert {"model.safetensors", "config.json", "generation_config.json"} < names
    assert {"tokenizer.json", "tokenizer_config.json", "README.md"} < names


def test_model_card_shows_the_runs_numbers(trained, tmp_path):
    card = (export(trained, tmp_path / "x") / "README.md").read_text()
    result = runs.read_json(trained / "training.json")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"| Validation loss | {result['val']['loss']:.4f} nats/token |" in card
    assert f"| Parameters | {result['n_params']:,} |" in card
    assert "| Training tokens | 2,048 |" in card
    assert "| Steps | 2 of 1,024 tokens |" in card


def test_unfinished_run_is_refused(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "training.json").unlink()
    assert main(["export", str(run), str(tmp_path / "x")]) == 2
    assert "no training.json, so it is not finished" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_folder_with_files_is_refused_and_left_alone(trained, tmp_path, capsys):
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    assert main(["export", str(trained), str(folder)]) == 2
    assert "is not an empty folder; name a new one" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()
    assert main(["export", str(trained), str(folder)]) == 0
    assert (folder / "README.md").exists()


def test_failed_export_leaves_nothing_behind(trained, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("llmlib.export.model_card", refuse)  # all else is written by then
    with pytest.raises(OSError, match="disk full"):
        export(trained, tmp_path / "out" / "x")
    assert list((tmp_path / "out").iterdir()) == []


def test_other_tokenizers_are_refused_by_name(make_finished, tmp_path, monkeypatch):
    ranks = {bytes([i]): i for i in range(256)}
    other = tiktoken.Encoding(
        "o200k_base", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256}
    )
    run = make_finished(LLAMA, other)
    monkeypatch.setattr("llmlib.tokenizer.load_tiktoken", lambda name: other)
    with pytest.raises(ValueError, match=r"tokenizer='o200k_base' cannot be exported.*'gpt2'"):
        export(run, tmp_path / "x")
    assert not (tmp_path / "x").exists()
