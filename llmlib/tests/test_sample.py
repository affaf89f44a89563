import pytest
import torch

from llmlib import runs, sample
from llmlib.config import llama_config, to_json
from llmlib.model import build_model
from llmlib.tokenizer import END_OF_TEXT, save_tokenizer, train_bpe

CONFIG = llama_config(2, 32, d_head=16, vocab_size=320, seq_len=24)


@pytest.fixture(scope="module")
def encoding():
    return train_bpe(["the cat sat on the mat. naïve café, ünïcödé 你好 " * 20], 300)


@pytest.fixture
def model():
    return build_model(CONFIG, seed=2).eval()


def continuation(model, **how):
    how = {"n_vocab": 300, "end_of_text": 299} | how
    return list(sample.generate(model, [1, 2, 3], 40, **how))


def test_temperature_zero_follows_the_likeliest_token(model):
    tokens = [1, 2, 3]
    for token in continuation(model, temperature=0):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[-CONFIG.seq_len :]]))[0, -1, :300]
        assert token == int(logits.argmax())
        tokens.append(token)
    assert len(tokens) > CONFIG.seq_len  # went on beyond the context


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


def test_text_comes_in_whole_characters(model, encoding):
    pieces = list(sample.continue_text(model, encoding, "naïve ", 60, temperature=2.0, top_k=300))
    again = list(sample.continue_text(model, encoding, "naïve ", 60, temperature=2.0, top_k=300))
    assert pieces == again
    assert all(isinstance(piece, str) for piece in pieces)
    assert "\ufffd" not in "".join(pieces[:-1])


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
    assert torch.equal(loaded(tokens), model(tokens))
    assert tokenizer.encode_ordinary("the cat") == encoding.encode_ordinary("the cat")
