import pytest
import torch
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from llmlib import runs, sample
from llmlib.config import gpt2_config, llama_config, to_json
from llmlib.model import build_model
from llmlib.tokenizer import END_OF_TEXT, save_tokenizer, train_bpe

CONFIG = llama_config(2, 32, d_head=16, vocab_size=320, seq_len=24)
GPT2 = gpt2_config(n_layer=2, d_model=32, n_head=2, vocab_size=320, seq_len=24)


@pytest.fixture(scope="module")
def encoding():
    return train_bpe(["the cat sat on the mat. naïve café, ünïcödé 你好 " * 20], 300)


@pytest.fixture
def model():
    return build_model(CONFIG, seed=2).eval()


def continuation(model, tokens=(1, 2, 3), n_new=40, **how):
    how = {"n_vocab": 300, "end_of_text": 299} | how
    return list(sample.generate(model, list(tokens), n_new, **how))


def logits_without_cache(model, tokens, window):
    with torch.no_grad():
        return model(torch.tensor([tokens[-window:]]))[0, -1]


@pytest.mark.parametrize("config", [CONFIG, GPT2], ids=lambda c: c.arch)
@pytest.mark.parametrize("n_prompt", [1, 3, 24, 60])
def test_cache_changes_no_logit_and_no_token(config, n_prompt, monkeypatch):
    """Also far beyond the context, of which the newer half is kept whenever it is full."""
    model = build_model(config, seed=2).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(5.0) if param.dim() >= 2 else None
    seen, next_logits = [], model.next_logits
    monkeypatch.setattr(model, "next_logits", lambda *a: seen.append(next_logits(*a)) or seen[-1])
    tokens = torch.randint(299, (n_prompt,), generator=torch.Generator().manual_seed(3)).tolist()
    written = continuation(model, tokens, n_new=50, temperature=0, end_of_text=-1)
    assert len(written) == len(seen) == 50
    window = min(n_prompt, 24)
    for token, logits in zip(written, seen, strict=True):
        window = 12 if window > 24 else window
        expected = logits_without_cache(model, tokens, window)
        assert torch.allclose(logits[0], expected, atol=1e-4)
        assert token == int(expected[:300].argmax())
        tokens.append(token)
        window += 1


def test_text_streams_as_it_is_computed(model, monkeypatch):
    calls, next_logits = [], model.next_logits
    monkeypatch.setattr(model, "next_logits", lambda *a: calls.append(1) or next_logits(*a))
    stream = sample.generate(model, [1], 40, n_vocab=300, end_of_text=-1)
    assert not calls
    next(stream), next(stream)
    assert len(calls) == 2


@pytest.mark.parametrize("top_k, top_p", [(320, 1.0), (7, 1.0), (320, 0.6), (20, 0.3), (1, 0.01)])
def test_top_k_and_top_p_leave_what_transformers_leaves(top_k, top_p):
    logits = 3 * torch.randn(320, generator=torch.Generator().manual_seed(5))
    chances, places = sample.likeliest(logits, top_k, top_p)
    ours = torch.zeros(320).scatter(0, places, chances / chances.sum())
    theirs = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, logits[None]))
    assert torch.allclose(ours, theirs.softmax(-1)[0], atol=1e-6)


def test_temperature_flattens_the_chances(model):
    with torch.no_grad():
        model.embed_tokens.weight.mul_(8.0)
    logits = logits_without_cache(model, [1, 2, 3], 3)[:300]
    likeliest = int(logits.argmax())
    for temperature in (1.0, 3.0):
        draws = [
            continuation(model, n_new=1, temperature=temperature, top_k=300, end_of_text=-1, seed=s)
            for s in range(500)
        ]
        chance = torch.softmax(logits / temperature, -1)[likeliest].item()
        assert 0.01 < chance < 0.99
        assert draws.count([likeliest]) / 500 == pytest.approx(chance, abs=0.07)  # 3 sigma


@pytest.mark.parametrize(
    "how", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str
)
def test_impossible_choice_is_refused_before_anything_is_written(model, how):
    ((name, value),) = how.items()
    with pytest.raises(ValueError, match=f"{name}={value} .*use "):
        sample.generate(model, [1], 5, n_vocab=300, end_of_text=299, **how)


def test_same_seed_gives_the_same_text_and_another_seed_does_not(model):
    assert continuation(model, seed=1) == continuation(model, seed=1)
    assert continuation(model, seed=1) != continuation(model, seed=2)


def test_padding_tokens_are_never_chosen(model):
    with torch.no_grad():
        model.embed_tokens.weight[300:] = 100.0  # padding would win if it were allowed
    assert max(continuation(model, top_k=320)) < 300


def test_end_of_text_ends_the_text(model):
    likeliest = continuation(model, temperature=0)[0]
    assert continuation(model, temperature=0, end_of_text=likeliest) == []


def test_text_comes_in_whole_characters(model, encoding, monkeypatch):
    tokens = [*"aé好".encode(), 0xFF, *b"b", *"好".encode()[:2]]  # the first 256 are bytes
    monkeypatch.setattr(sample, "generate", lambda *_, **__: iter(tokens))
    pieces = list(sample.continue_text(model, encoding, "", 60))
    assert pieces == ["a", "é", "好", "\ufffd", "b", "\ufffd"]


def test_an_empty_prompt_starts_a_new_document(model, encoding):
    start = encoding.encode_single_token(END_OF_TEXT)
    pieces = "".join(sample.continue_text(model, encoding, "", 5, temperature=0))
    tokens = list(
        sample.generate(
            model, [start], 5, n_vocab=encoding.n_vocab, end_of_text=start, temperature=0
        )
    )
    assert pieces == encoding.decode(tokens)


def test_a_run_without_weights_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*no model\.safetensors.*finished run"):
        sample.load_run(tmp_path / "nowhere")


def test_loaded_run_computes_what_was_saved(tmp_path, model, encoding):
    from safetensors.torch import save_file

    runs.write_json(tmp_path / "config.json", {"model": to_json(CONFIG)})
    runs.write_atomic(tmp_path / "tokenizer.json", save_tokenizer(encoding))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded, tokenizer = sample.load_run(tmp_path)
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded.cpu()(tokens), model(tokens))
    assert tokenizer.encode_ordinary("the cat") == encoding.encode_ordinary("the cat")
