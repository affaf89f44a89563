"""The table of devices, and the sentences about what is missing, without an accelerator."""

import pytest
import torch

from llmlib import devices
from llmlib.config import override
from llmlib.devices import Abilities, pick_device
from llmlib.tests.conftest import SMOKE
from llmlib.trainer import Trainer

A100 = "NVIDIA A100-SXM4-40GB, 535.104.05"


@pytest.fixture
def drive(monkeypatch):
    """Return a function that makes torch find an accelerator of some type, or None."""

    def drive(kind):
        found = kind and torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)

    return drive


@pytest.mark.parametrize("has_bf16", [True, False])
def test_run_follows_the_row_of_its_device(make_run, monkeypatch, has_bf16):
    """The CPU stands in for a device that does not compile, and gains from pinned memory."""
    pinned = []
    monkeypatch.setitem(devices.ABILITIES, "cpu", Abilities(lambda _: has_bf16, False, True))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t)
    result = Trainer(make_run(override(SMOKE.train, compile=True, budget_steps=2))).run()
    assert result["dtype"] == ("bfloat16" if has_bf16 else "float32")
    assert not result["is_compiled"] and len(pinned) >= 4


@pytest.mark.parametrize(
    ("kind", "device", "n"), [("xpu", "xpu:3", 8), ("mps", "mps:3", 8), ("mtia", "cpu", 0)]
)
def test_accelerator_is_taken_where_torch_can_drive_one_that_the_table_has(drive, kind, device, n):
    drive(kind)
    assert str(pick_device()) == device and devices.n_accelerators() == n
    drive(None)
    assert str(pick_device()) == "cpu" and devices.n_accelerators() == 0
    assert devices.device_name() == "CPU" and devices.memory_bytes() is None


@pytest.mark.parametrize(
    ("cuda", "smi", "said"),
    [
        ("13.0", (0, A100), ["CUDA 13.0", "driver from 580 on", f"finds {A100}", "cu126"]),
        ("12.6", (0, f"{A100}\n{A100}"), ["driver from 525 on", f"{A100}; {A100}"]),
        (None, (127, "not found"), ["built for no CUDA", "finds no driver, or no NVIDIA GPU"]),
    ],
)
def test_missing_accelerator_is_named_with_what_would_mend_it(drive, monkeypatch, cuda, smi, said):
    drive(None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(devices.subprocess, "getstatusoutput", lambda _: smi)
    with pytest.raises(ValueError) as error:
        pick_device(needed=True)
    version = torch.__version__.split("+")[0]
    for part in (*said, f"pip install torch=={version} ", "whl/cu126", "-p allow_cpu True"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("card", "built", "works"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_120"], False),
        ((7, 5), ["sm_75", "sm_80", "sm_120"], True),
        ((12, 1), ["sm_75", "sm_80", "sm_120"], True),
        ((8, 0), ["sm_90a", "compute_90"], False),
        ((9, 0), ["gfx90a"], True),
    ],
)
def test_card_older_than_every_kernel_is_refused(drive, monkeypatch, card, built, works):
    drive("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    if works:
        assert pick_device() == torch.device("cuda", 3)
    else:
        text = f"Card has capability {card[0]}.{card[1]}, .* kernels for {built[0]} .*cu126"
        with pytest.raises(ValueError, match=text):
            pick_device()


def test_bf16_begins_with_capability_8(monkeypatch):
    for card, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, card=card: card)
        assert devices.compute_dtype(torch.device("cuda", 0)) == dtype


def test_each_cache_compiles_anew_and_is_kept(monkeypatch, tmp_path):
    from torch._dynamo.utils import counters

    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # put back afterwards
    monkeypatch.setattr(devices, "USUAL_CACHE", str(tmp_path / "usual"))
    found = []
    for folder in (tmp_path / "a", tmp_path / "b", tmp_path / "a", None, None):
        counters.clear()
        devices.use_compile_cache(folder)
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8))
        found.append(counters["inductor"]["fxgraph_cache_hit"])
    assert found[:4] == [0, 0, 1, 0]
    assert all((tmp_path / name).exists() for name in ("a", "b", "usual"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"), True),
        (RuntimeError("no kernel image is available for execution"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_that_ends_is_known_in_every_librarys_words(error, expected):
    assert devices.is_out_of_memory(error) is expected
