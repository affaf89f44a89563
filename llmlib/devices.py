"""Devices: which one computes, what its type can do, and in words what is missing where it cannot.

One table holds CUDA (and ROCm, which torch calls CUDA), Intel's XPU, Apple's MPS and the CPU; the
code is the same for all. Weights are fp32 everywhere, and all four have fused optimizers.
"""

import contextlib
import ctypes
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn


class Abilities(NamedTuple):
    """What devices of a type can do."""

    has_bf16: Callable[[torch.device], bool]  # units that multiply in it
    compiles: bool  # torch.compile is more than a prototype
    pins_memory: bool  # copies from pinned memory do not wait


ABILITIES = {  # xpu and mps by torch's documentation, untested
    "cuda": Abilities(lambda d: torch.cuda.get_device_capability(d) >= (8, 0), True, True),
    "xpu": Abilities(lambda _: torch.xpu.is_bf16_supported(False), True, True),
    "mps": Abilities(lambda _: False, False, False),
    "cpu": Abilities(
        lambda _: torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported(),
        compiles=True,
        pins_memory=False,
    ),
}
REMEDY = (  # builds of the same version, by the support matrix in PyTorch's RELEASE.md
    f"Install another build: pip install torch=={torch.__version__.split('+')[0]} --index-url "
    "https://download.pytorch.org/whl/cu126 (drivers from 525 on, Maxwell to Hopper) or .../whl/cu130 "
    "(from 580 on, Turing and later). To train on the CPU, far more slowly: -p allow_cpu True, and "
    "CUDA_VISIBLE_DEVICES='' to hide a card."
)
USUAL_CACHE = os.environ.get("TORCHINDUCTOR_CACHE_DIR")


def accelerator() -> torch.device | None:
    """Return the kind of accelerator that torch can drive here, if the table has it."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None and found.type in ABILITIES else None


def n_accelerators() -> int:
    """Count accelerators; 0 where torch can drive none, however many the machine has."""
    return torch.accelerator.device_count() if accelerator() else 0


def device_name() -> str:
    kind = accelerator() or torch.device("cpu")
    return getattr(torch.get_device_module(kind), "get_device_name", kind.type.upper)()


def memory_bytes() -> int | None:
    """Return the memory of the accelerator, None on a CPU and where torch does not tell."""
    module = torch.get_device_module(accelerator()) if accelerator() else None
    properties = getattr(module, "get_device_properties", None)
    return properties().total_memory if properties else None


def pick_device(*, needed: bool = False) -> torch.device:
    """Use this process's accelerator where there is one, else the CPU.

    Raises ``ValueError`` where one is needed and missing, and where it is too old for this torch.
    """
    kind = accelerator()
    if kind is None:
        if needed:
            raise ValueError(_what_is_missing())
        return torch.device("cpu")
    device = torch.device(kind.type, torch.accelerator.current_device_index())
    if kind.type == "cuda":
        card, built = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
        codes = re.findall(r"(?:sm|compute)_(\d+)(\d)", " ".join(built))  # none for ROCm
        if codes and card < min((int(major), int(minor)) for major, minor in codes):
            raise ValueError(
                f"{device_name()} has capability {card[0]}.{card[1]}, and torch {torch.__version__} "
                f"has kernels for {' '.join(built)} only. {REMEDY}"
            )
    return device


def _what_is_missing() -> str:
    cuda, query = torch.version.cuda, "--query-gpu=name,driver_version --format=csv,noheader"
    driver = 525 if str(cuda).startswith("12") else 580  # NVIDIA, "CUDA Compatibility"
    needs = f"CUDA {cuda}, which needs an NVIDIA driver from {driver} on" if cuda else "no CUDA"
    status, found = subprocess.getstatusoutput(f"nvidia-smi {query}")
    here = "no driver, or no NVIDIA GPU" if status else "; ".join(found.splitlines())
    return (
        f"this needs an accelerator, and torch {torch.__version__}, built for {needs}, finds none "
        f"it can drive; nvidia-smi finds {here}. {REMEDY}"
    )


def compute_dtype(device: torch.device, name: str | None = None) -> torch.dtype:
    """Choose bf16 where the hardware multiplies in it, else fp32; weights are fp32 either way."""
    if name is not None:
        return getattr(torch, name)
    return torch.bfloat16 if ABILITIES[device.type].has_bf16(device) else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Compute matrix products in ``dtype``."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def keep_freed_memory() -> None:
    """Let this process reuse the memory of large tensors instead of faulting it in again.

    A step was 1.11 to 1.17 times as fast with it on a CPU.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # a C library other than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def is_out_of_memory(error: Exception) -> bool:
    """Say whether memory ended, also where a library says so in its own words."""
    says_so = re.search("(?i)out.?of.?memory|alloc_failed", repr(error))
    return isinstance(error, RuntimeError) and says_so is not None


def compile_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Compile without graph breaks, where the type of device can; the first step does the work."""
    compiles = ABILITIES[device.type].compiles
    return torch.compile(model, fullgraph=True, dynamic=False) if compiles else model


def why_uncompiled(error: Exception) -> str:
    """Say in one line why compiling failed, what that costs, and what often mends it."""
    lines = f"{type(error).__name__}: {error}".splitlines()
    cause = next((line for line in reversed(lines) if "error: " in line), lines[0])
    return (
        f"compiling failed ({cause:.200}), so the model runs uncompiled (about 1.5 times slower); "
        "it needs g++ and Python.h: sudo apt install g++ python3-dev"
    )


def use_compile_cache(folder: Path | None) -> None:
    """Keep compiled code in a folder, by default the usual one; another folder's is forgotten."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    from torch._inductor.utils import clear_caches

    place = str(folder or USUAL_CACHE or default_cache_dir())
    if place != os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        torch.compiler.reset()
        clear_caches()
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": place, "TRITON_CACHE_DIR": f"{place}/triton"}
