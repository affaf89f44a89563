"""Generation against the model without a cache, and exports loaded by transformers."""

import math
import random
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from safetensors.torch import save_file

from llmlib import data, devices, inference, runs
from llmlib.config import llama_config, resize
from llmlib.data import END_OF_TEXT, save_tokenizer, train_bpe
from llmlib.inference import continue_text, export, generate, load_run, next_chances, score
from llmlib.model import build_model
from llmlib.tests.conftest import SMOKE

transformers = pytest.importorskip("transformers")

LLAMA = llama_config(2, 64, d_head=16, vocab_size=448, seq_len=48, rope_theta=500.0)
GPT2 = resize(LLAMA, arch="gpt2")
NO_END = SimpleNamespace(n_vocab=400, eot_token=-1)  # a tokenizer whose end is never met
PIECES = ["def f(x):\n    return x ** 2\n", "the cat's hat", "naïve café", "你好，世界", "Ελληνικά"]
PIECES += ["👩‍👩‍👧‍👦😀", "é", "3.14159 1234567", "\n\n\n", "   ", "\t\t", " \n ", "\r\n"]
PIECES += ["\xa0\u3000", "we'll they're I'M", "!?...", "\x00\x7f", "\ufeff\u200b", "\x85\u2028"]
PIECES += ["a" * 30, " ", "<|", END_OF_TEXT, "aaaa bbb"]


def varied_texts(n):
    pick = random.Random(0)
    return PIECES + ["".join(pick.choices(PIECES, k=pick.randint(0, 9))) for _ in range(n)]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(varied_texts(300), 400)


@pytest.fixture
def make_finished(tmp_path):
    """Return a function that makes a run with weights so large that wrong details would show."""

    def make(config, encoding):
        run, tokens_dir, model = tmp_path / "run", tmp_path / "tokens", build_model(config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for param in model.parameters():
                noise = torch.randn(param.shape, generator=generator)
                param.mul_(4.0) if param.dim() >= 2 else param.add_(0.3 * noise)
            model.embed_tokens.weight[encoding.n_vocab :] *= 3  # padding that would often win
        manifest = {"tokenizer": {"vocab_size": encoding.n_vocab}}
        runs.write_json(tokens_dir / "manifest.json", manifest)
        runs.write_atomic(tokens_dir / "tokenizer.json", save_tokenizer(encoding))
        runs.create_run(run, config, SMOKE.train, tokens_dir)
        save_file(model.state_dict(), run / "model.safetensors")
        result = {"n_params": 1, "n_tokens": 2, "val": {"loss": 3.0}}
        runs.write_json(run / "result.json", result)
        return run

    return make


# ------------------------------------------------------------------------- generation


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=lambda c: c.arch)
@pytest.mark.parametrize("n_prompt", [1, 48, 60])
@torch.no_grad()
def test_cache_changes_no_token(config, n_prompt):
    """Also far beyond the context, of which the newer half is kept whenever it is full."""
    model, window = build_model(config, seed=2).eval(), min(n_prompt, 48)
    for param in model.parameters():
        param.mul_(5.0) if param.dim() >= 2 else None
    tokens = torch.randint(400, (n_prompt,), generator=torch.Generator().manual_seed(3)).tolist()
    for token in generate(model, NO_END, list(tokens), 80, temperature=0):
        window = 24 if window > 48 else window
        logits = model(torch.tensor([tokens[-window:]]))[0, -1, :400]
        assert logits[token] > logits.max() - 1e-4
        tokens.append(token)
        window += 1
    assert len(tokens) == n_prompt + 80


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [320, 20, 7, 1])
def test_chances_are_those_of_transformers(temperature, top_k):
    from transformers.generation import logits_process as theirs

    logits = 3 * torch.randn(320, generator=torch.Generator().manual_seed(5))
    ours = next_chances(logits, temperature, top_k)
    warped = theirs.TemperatureLogitsWarper(temperature)(None, logits[None])
    warped = theirs.TopKLogitsWarper(top_k)(None, warped)
    assert torch.allclose(ours, warped.softmax(-1)[0], atol=1e-6)


@pytest.mark.parametrize(("name", "value"), [("temperature", -1.0), ("top_k", 0)])
def test_impossible_choice_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}.* use "):
        next(generate(build_model(LLAMA), NO_END, [1], 5, **{name: value}))


def test_seed_decides_padding_is_never_chosen_and_end_of_text_ends():
    model = build_model(LLAMA)
    first, again, other = (list(generate(model, NO_END, [1], 20, seed=s)) for s in (1, 1, 2))
    assert first == again != other
    with torch.no_grad():
        model.embed_tokens.weight[400:] = 100.0  # padding would win if it were allowed
    written = list(generate(model, NO_END, [1], 20, top_k=448))
    assert len(written) == 20 and max(written) < 400
    likeliest = next(generate(model, NO_END, [1], 1, temperature=0))
    ends = SimpleNamespace(n_vocab=400, eot_token=likeliest)
    assert list(generate(model, ends, [1], 20, temperature=0)) == []


def test_text_comes_in_whole_characters(bpe, monkeypatch):
    tokens = [*"aé好".encode(), 0xFF, *b"b", *"好".encode()[:2]]  # the first 256 are bytes
    monkeypatch.setattr(inference, "generate", lambda *_, **__: iter(tokens))
    pieces = [piece for piece in continue_text(build_model(LLAMA), bpe, "", 60) if piece]
    assert pieces == ["a", "é", "好", "\ufffd", "b", "\ufffd"]


def test_an_empty_prompt_starts_a_new_document(bpe):
    model = build_model(LLAMA).eval()
    tokens = list(generate(model, bpe, [bpe.eot_token], 5, temperature=0))
    text = "".join(continue_text(model, bpe, "", 5, temperature=0))
    assert text == bpe.decode_bytes(tokens).decode(errors="replace")


# ------------------------------------------------------------------------- export


@pytest.mark.parametrize("name", ["bpe", "gpt2"])
def test_exported_tokenizer_gives_the_same_ids(name, request, make_finished, tmp_path):
    encoding = request.getfixturevalue(name)
    config = llama_config(1, 16, d_head=16, vocab_size=50_304, seq_len=32)
    folder = export(make_finished(config, encoding), tmp_path / "x")
    theirs, texts = transformers.AutoTokenizer.from_pretrained(folder), varied_texts(3000)
    expected = [encoding.encode_ordinary(text) for text in texts]
    assert theirs(texts).input_ids == expected
    assert [theirs.decode(tokens) for tokens in expected] == texts
    assert len(theirs) == encoding.n_vocab and theirs.model_max_length == 32
    assert f"knows the tokenizer gpt2; this one is {name}." in (folder / "README.md").read_text()
    end = encoding.eot_token
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == end
    assert end not in theirs(f"a{END_OF_TEXT}b").input_ids  # in a text, its name is text


@torch.no_grad()
def test_exported_model_computes_and_writes_as_ours(bpe, make_finished, tmp_path):
    run = make_finished(LLAMA, bpe)
    theirs, found = transformers.AutoModelForCausalLM.from_pretrained(
        export(run, tmp_path / "x"), output_loading_info=True
    )
    assert not any(found.values())  # nothing missing, unexpected or of another shape
    assert theirs.dtype == torch.float32
    ours, encoding = load_run(run)
    ours.cpu()  # where theirs is
    tokens = torch.randint(400, (2, 48), generator=torch.Generator().manual_seed(0))
    logits = ours(tokens)
    assert (logits - theirs(tokens).logits).abs().max() < 1e-4
    assert (logits.argmax(-1) >= encoding.n_vocab).any()  # padding, if it were allowed
    for prompt in ("the cat", "naïve ", "\n\n1234", "你好"):
        start = encoding.encode_ordinary(prompt)
        written = theirs.generate(torch.tensor([start]), max_new_tokens=30, do_sample=False)
        expected = list(generate(ours, encoding, start, 30, temperature=0))
        ended = [encoding.eot_token] * (len(expected) < 30)
        assert written[0, len(start) :].tolist() == expected + ended


def test_a_refused_export_writes_nothing(bpe, make_finished, tmp_path, monkeypatch):
    def refuse(run, words, folder=tmp_path / "new"):
        with pytest.raises(ValueError, match=words):
            export(run, folder)

    refuse(make_finished(GPT2, bpe), "arch='gpt2' cannot be exported; train with arch='llama'")
    shutil.rmtree(tmp_path / "run")
    run = make_finished(LLAMA, bpe)
    refuse(run, "is not an empty folder; name a new one", run)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)  # importing it fails
        refuse(run, r'pip install -e "\.\[export\]"')
    with monkeypatch.context() as patch:
        patch.setattr(tiktoken.Encoding, "eot_token", 0)  # as where special tokens lie elsewhere
        refuse(run, "tokenizer='bpe' cannot be exported; train with ")
    (run / "result.json").unlink()
    refuse(run, r"no result\.json or no weights: it is not finished \(start it again\)")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------- evaluation


def test_run_and_export_score_as_transformers_says(bpe, make_finished, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "compute_dtype", lambda *_: torch.float32)
    run, tokens_dir = make_finished(LLAMA, bpe), tmp_path / "tokens"
    stream = np.array(bpe.encode_ordinary("".join(varied_texts(60))), dtype="<u2")
    stream.tofile(tokens_dir / "val.bin")
    counts = {"documents": 1, "bytes": 2 * len(stream), "tokens": len(stream)}
    val = {"file": "val.bin", "n_tokens": len(stream), "domains": {"all": counts}}
    runs.write_json(tokens_dir / "manifest.json", {"splits": {"val": [val]}, "dtype": "<u2"})
    [ours] = score(run, tokens_dir).to_dict("records")
    [theirs] = score(export(run, tmp_path / "x"), tokens_dir).to_dict("records")
    assert theirs.pop("val_sha256") == ours.pop("val_sha256")
    assert theirs == pytest.approx(ours, rel=1e-5)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    windows = torch.from_numpy(data.eval_windows(tokens_dir, "val", 48))
    with torch.no_grad():
        expected = model(windows, labels=windows).loss.item()  # of each, all but its last input
    assert ours["loss"] == pytest.approx(expected, rel=1e-5)
    assert ours["bits_per_byte"] == pytest.approx(ours["loss"] / 2 / math.log(2))
    other = train_bpe(varied_texts(300)[20:], 390)
    runs.write_atomic(tokens_dir / "tokenizer.json", save_tokenizer(other))
    for model in (run, tmp_path / "x"):
        with pytest.raises(ValueError, match=rf"{model.name}.*another vocabulary.*01_data_prep"):
            score(model, tokens_dir)
    alien = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=400)
    transformers.GPT2LMHeadModel(alien).save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match=r"model_type='gpt2' in .* is not 'llama'"):
        score(tmp_path / "x", tokens_dir)
