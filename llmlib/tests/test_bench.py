"""Ceilings, turns, variants and fits of the benchmark."""

import os
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from llmlib import bench, bench_model, runs
from llmlib import model as production
from llmlib.bench_model import FullLogits, Job, LowRMSNorm, Transformers
from llmlib.config import PRESETS, gpt2_config, llama_config, override
from llmlib.model import build_model
from llmlib.sizing import count_params, flops_per_token

MODEL, TRAIN = PRESETS["smoke"].model, PRESETS["smoke"].train
FEW = {"n_rounds": 2, "n_steps": 1}


@pytest.fixture
def tokens():
    draws = torch.randint(MODEL.vocab_size, (3, 33), generator=torch.Generator().manual_seed(0))
    return draws[:, :-1].contiguous(), draws[:, 1:].contiguous()


def loss_and_gradients(model, tokens):
    loss = model(*tokens)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("model", [MODEL, PRESETS["a100"].model, gpt2_config()])
def test_products_and_attention_make_up_the_models_flops(model):
    table = bench.products(model, TRAIN)
    n_tokens = TRAIN.micro_batch * TRAIN.grad_accum * model.seq_len
    attention = 12 * model.n_layer * model.d_model * model.seq_len * n_tokens
    products = (table["count"] * table.flops).sum()
    assert products + attention == flops_per_token(model) * n_tokens


def test_floor_adds_up_what_was_measured():
    table = bench.measure_products(MODEL, TRAIN, (64,))
    assert set(table["pass"]) >= {"forward", "to the input", "to the weight"}
    assert (table.flops_per_s > 0).all()
    n_tokens = TRAIN.micro_batch * TRAIN.grad_accum * MODEL.seq_len
    floor = bench.floor_seconds(table, 1e9, count_params(MODEL))
    mean_rate = flops_per_token(MODEL) * n_tokens / floor["products"]
    assert table.flops_per_s.min() < mean_rate < table.flops_per_s.max()
    assert floor["optimizer"] == pytest.approx(28 * count_params(MODEL) / 1e9)


def test_complex_rope_gives_the_same_loss_and_gradients(tokens, monkeypatch):
    model = build_model(MODEL)
    real = loss_and_gradients(model, tokens)
    monkeypatch.setattr(production, "rotate", production.rotate)  # put back afterwards
    altered = bench_model.without_levers(model, ("real RoPE",), torch.float32)
    assert production.rotate is bench_model.rotate_complex
    torch.testing.assert_close(loss_and_gradients(altered, tokens), real)


def test_all_logits_at_once_give_the_same_loss_and_gradients(tokens):
    model = build_model(MODEL)
    full = bench_model.without_levers(model, ("chunked loss",), torch.float32)
    assert isinstance(full, FullLogits)
    torch.testing.assert_close(
        loss_and_gradients(full, tokens), loss_and_gradients(model, tokens), rtol=1e-4, atol=1e-6
    )


def test_norms_are_exchanged_and_low_statistics_equal_ours_in_fp32(tokens):
    reference = loss_and_gradients(build_model(MODEL), tokens)
    low = bench_model.without_levers(build_model(MODEL), ("fp32 statistics",), torch.float32)
    assert sum(isinstance(m, LowRMSNorm) for m in low.modules()) == 2 * MODEL.n_layer + 1
    torch.testing.assert_close(loss_and_gradients(low, tokens), reference)
    layer = bench_model.without_levers(build_model(MODEL), ("RMSNorm",), torch.float32)
    assert sum(isinstance(m, torch.nn.LayerNorm) for m in layer.modules()) == 2 * MODEL.n_layer + 1
    assert sum(p.numel() for p in layer.parameters()) == count_params(MODEL)


def test_transformers_computes_the_same_function(tokens):
    pytest.importorskip("transformers")
    ours, theirs = build_model(MODEL), Transformers(MODEL)
    weights = {f"model.{name}": w for name, w in ours.state_dict().items()}
    missing = theirs.model.load_state_dict(weights, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"} and not missing.unexpected_keys
    torch.testing.assert_close(theirs(*tokens), ours(*tokens))


def test_unfused_adamw_takes_the_same_steps():
    losses = [
        bench_model.Stage(Job("", MODEL, TRAIN, without)).losses(4)
        for without in ((), ("fused AdamW",))
    ]
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_crash_and_an_error_cost_one_row_each(monkeypatch):
    jobs = [
        Job("ours", MODEL, TRAIN),
        Job("error", MODEL, override(TRAIN, optimizer="no such thing")),
        Job("skipped", MODEL, TRAIN, skip="skipped: not here"),
        Job("other", MODEL, TRAIN, ("fused AdamW",)),
    ]
    table = bench.take_turns(jobs, **FEW).set_index("name")
    assert table.note["error"].startswith("failed: ValueError: optimizer='no such thing'")
    assert table.note["skipped"] == "skipped: not here"
    assert table.tokens_per_s.notna().to_dict() == {
        "ours": True, "error": False, "skipped": False, "other": True,
    }  # fmt: skip
    with bench.Contestant(jobs[0]) as contestant:
        contestant.wait()
        contestant.ask(os._exit, 1)
        assert contestant.note.startswith("failed: BrokenProcessPool")
        contestant.take_turn(1)
        assert np.isnan(contestant.seconds).all()


def test_each_contestant_has_its_own_memory():
    large = llama_config(2, 256, d_head=64, vocab_size=32_768, seq_len=MODEL.seq_len)
    one = override(TRAIN, micro_batch=1, grad_accum=1)
    table = bench.take_turns([Job("small", MODEL, one), Job("large", large, one)], **FEW)
    tensors_gib = 4 * 4 * table.n_params[1] / 2**30  # weights, gradients, two moments
    assert table.memory_gib[1] - table.memory_gib[0] > 0.8 * tensors_gib
    row = table.iloc[1]
    assert row.flops_per_s == pytest.approx(row.tokens_per_s * flops_per_token(large))
    assert row.tokens_per_s_low <= row.tokens_per_s <= row.tokens_per_s_high


def test_claims_are_judged_by_the_whole_interval():
    table = pd.DataFrame(
        [
            ("ours", "", 1.0, 1.0, ""),
            ("a", "1.15x", 1.02, 1.3, ""),
            ("b", "1.15x", 0.9, 1.3, ""),
            ("c", "above 1x", 0.8, 0.9, ""),
            ("d", "", 0.8, 0.9, ""),
            ("e", "1.10x", np.nan, np.nan, "failed: x"),
        ],
        columns=["name", "claim", "speed_up_low", "speed_up_high", "note"],
    )
    assert bench.judge(table).tolist() == [
        "reference", "confirmed", "no difference", "not confirmed", "ours is slower", "failed: x",
    ]  # fmt: skip


@pytest.mark.parametrize("scale", PRESETS)
def test_variants_of_a_scale_keep_its_step(scale):
    model, train = PRESETS[scale].model, PRESETS[scale].train
    n_sequences = train.micro_batch * train.grad_accum
    jobs = bench.ablations(model, train) + bench.micro_batches(model, train)
    jobs += bench.waterfall(model, train)
    assert {job.train.micro_batch * job.train.grad_accum for job in jobs} == {n_sequences}
    own = count_params(model)
    assert all(count_params(job.model) == pytest.approx(own, rel=0.1) for job in jobs)
    assert {job.tokens_per_step for job in bench.contexts(model, train)} == {
        n_sequences * model.seq_len
    }
    shapes = bench.shapes(model, train, scale)
    assert shapes[0].model == model
    assert len({(job.model.n_layer, job.model.d_model) for job in shapes}) == len(shapes)
    assert {job.model.d_head for job in shapes} == {model.d_head}


def test_micro_batch_grows_until_speed_stops_rising():
    def choose(*speeds):
        sizes = [2**i for i in range(len(speeds))]
        table = pd.DataFrame({"micro_batch": sizes, "tokens_per_s": speeds})
        table["grad_accum"] = 16 // table.micro_batch
        return bench.choose_micro_batch(table.sample(frac=1, random_state=0))

    assert choose(10, 20, 20.3, 40) == {"micro_batch": 2, "grad_accum": 8}
    assert choose(10, 20, 30, np.nan) == {"micro_batch": 4, "grad_accum": 4}  # out of memory
    assert choose(10, 5) == {"micro_batch": 1, "grad_accum": 16}


def test_kinds_of_work_add_up_to_the_step():
    model = override(MODEL, vocab_size=640)  # unlike the micro-batch's 512 tokens
    kinds = bench.where_time_goes(model, TRAIN, n_steps=3)
    bare, read = kinds.pop("bare step"), kinds.pop("read one batch")
    assert min(bare, read) > 0
    assert set(kinds) == {*bench_model.KINDS, "idle and other"}
    assert all(seconds >= 0 for seconds in kinds.values())
    assert min(kinds["matmul"], kinds["attention"], kinds["head and loss"]) > 0


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("aten::mm", [[512, 64], [64, 640]], "head and loss"),
        ("aten::mm", [[512, 64], [64, 192]], "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", [], "matmul"),
        ("void pytorch_flash::flash_fwd_kernel<...>", [], "attention"),
        ("triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_3", [], "elementwise and norms"),
        ("graph_0_cpp_fused_arange_eq_exp_gather_logsumexp_sub_7", [], "head and loss"),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", [], "optimizer and clipping"),
        ("Memcpy HtoD (Pinned -> Device)", [], "data"),
        ("cudaLaunchKernel", [], "other"),
    ],
)
def test_kernels_are_classified_by_name_and_shape(name, shapes, kind):
    assert bench_model.kind_of_work(name, shapes, vocab_size=640) == kind


def test_exponents_of_power_laws_are_recovered():
    x = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    noise = np.exp(0.1 * np.random.default_rng(0).standard_normal(5))
    assert bench.fit_exponent(x, 3 * x**-0.7) == pytest.approx((-0.7, 0), abs=1e-12)
    slope, error = bench.fit_exponent(x, 3 * x**1.5 * noise)
    stats = pytest.importorskip("scipy.stats")
    reference = stats.linregress(np.log(x), np.log(3 * x**1.5 * noise))
    assert (slope, error) == pytest.approx((reference.slope, reference.stderr))


def test_command_prints_ratios_and_says_what_is_missing(monkeypatch, capsys, tmp_path):
    small = "--n-layer 1 --d-model 64 --seq-len 32 --vocab-size 512 --micro-batch 2 --rounds 1"
    output = tmp_path / "table.json"
    arguments = [*small.split(), "--steps", "1", "--check-losses", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    monkeypatch.setattr(bench, "side_by_side", lambda *a: [
        Job("ours", *a[:2], ("compile",)), Job("broken", *a[:2], dtype="no_type"), Job("eager", *a[:2], ("compile",)),
    ])  # fmt: skip
    bench.main()
    printed = capsys.readouterr().out
    assert "failed: AttributeError" in printed and "2 steps of ours and eager" in printed
    record = runs.read_json(output)
    assert [row["name"] for row in record["rows"]] == ["ours", "broken", "eager"]
    assert record["losses"] and record["peak_flops_per_s"] > 0
    table = bench.recorded(tmp_path)
    assert table.name.tolist() == ["ours", "broken", "eager"] and set(table.machine) == {"table"}
    assert bench.recorded(tmp_path / "empty").empty
