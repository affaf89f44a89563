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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Abilities:
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
DRIVERS = {"11": 450, "12": 525, "13": 580}  # the oldest for a CUDA (NVIDIA, CUDA Compatibility)
REMEDY = (  # builds of the same version, by the support matrix in PyTorch's RELEASE.md
    f"Install another build: pip install torch=={torch.__version__.split('+')[0]} --index-url "
    "https://download.pytorch.org/whl/cu126 (drivers from 525 on, cards from Maxwell to Hopper) or "
    ".../whl/cu130 (drivers from 580 on, cards from Turing on). To train on the CPU, far more "
    "slowly: -p allow_cpu True, and CUDA_VISIBLE_DEVICES='' to hide a card."
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
    kind = accelerator()
    module = torch.get_device_module(kind) if kind else None
    return getattr(module, "get_device_name", lambda: kind.type.upper() if kind else "CPU")()


def memory_bytes() -> int | None:
    """Return the memory of the accelerator, None on a CPU and where torch does not tell."""
    module = torch.get_device_module(accelerator()) if accelerator() else None
    properties = getattr(module, "get_device_properties", None)
    return properties().total_memory if properties else None


def pick_device(local_rank: int = 0, *, needed: bool = False) -> torch.device:
    """Use the accelerator where there is one, else the CPU.

    Raises ``ValueError`` where one is needed and missing, and where torch has no kernels for it.
    """
    kind = accelerator()
    if kind is None and needed:
        raise ValueError(_what_is_missing())
    device = torch.device(kind.type, local_rank) if kind else torch.device("cpu")
    if device.type == "cuda":
        card, built = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
        if not has_kernels(card, built):
            raise ValueError(
                f"{device_name()} has capability {card[0]}.{card[1]}, and torch {torch.__version__} "
                f"has kernels for {' '.join(built)} only. {REMEDY}"
            )
    return device


def has_kernels(card: tuple[int, int], built: list[str]) -> bool:
    """Say whether a build has code for a card: PTX serves all newer ones, other code its major.

    Names that are not CUDA's, such as ROCm's, are taken as they are.
    """
    codes = re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(built))
    return not codes or any(
        (int(major), int(minor)) <= card and (kind == "compute" or int(major) == card[0])
        for kind, major, minor in codes
    )


def _what_is_missing() -> str:
    """Say what torch was built for, what the machine has, and which builds there are."""
    cuda, query = torch.version.cuda or "", "--query-gpu=name,driver_version --format=csv,noheader"
    driver = f"needs an NVIDIA driver from {DRIVERS.get(cuda[:2], 580)} on"
    built = f"CUDA {cuda}, which {driver}" if cuda else "other hardware than NVIDIA's"
    status, found = subprocess.getstatusoutput(f"nvidia-smi {query}")
    here = "no driver, or no NVIDIA GPU" if status else "; ".join(found.splitlines())
    return (
        f"this needs an accelerator, and torch {torch.__version__} (ROCm: {torch.version.hip}) finds "
        f"none it can drive. It is built for {built}; nvidia-smi finds {here}. {REMEDY}"
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


def empty_cache() -> None:
    """Give back the memory that torch keeps for tensors to come, if it keeps any."""
    if accelerator():
        torch.accelerator.empty_cache()


def compile_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Compile without graph breaks, where the type of device can; the first step does the work."""
    if not ABILITIES[device.type].compiles:
        return model
    return torch.compile(model, fullgraph=True, dynamic=False)


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
