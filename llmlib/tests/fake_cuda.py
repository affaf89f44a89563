"""The real step of the a100 scale on a CUDA device that is not there: no data, only shapes and devices.

As a program, ``python -m llmlib.tests.fake_cuda LIBRARY CASES`` prints what ``trace`` finds for each
case. ``LIBRARY`` is what ``build`` makes of ``fake_cuda.cpp``; it must be loaded before torch. Eager
mode, so memory is an upper bound for a compiled step.
"""

import contextlib
import ctypes
import importlib.util
import json
import subprocess
import sys
import weakref
from pathlib import Path

from llmlib.config import SCALES, ModelConfig, TrainConfig, override, resize

TORCH = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
WAITS = ("_local_scalar_dense", "nonzero", "unique", "is_nonzero")


def build(folder: Path) -> Path:
    """Compile the library against the headers of the torch that is installed."""
    source, library = Path(__file__).with_suffix(".cpp"), folder / "fake_cuda.so"
    command = ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{TORCH}/include", str(source)]
    command += ["-o", str(library), f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def configs(
    arch: str, optimizer: str, micro_batch: int, n_layer=None, d_model=None, dtype="bfloat16"
) -> tuple[ModelConfig, TrainConfig]:
    """The a100 scale's configs with a case's changes; more accumulation needs no more memory."""
    changes = {"optimizer": optimizer, "micro_batch": micro_batch, "grad_accum": 2, "dtype": dtype}
    model = resize(SCALES["a100"].model, arch=arch, n_layer=n_layer, d_model=d_model)
    return model, override(SCALES["a100"].train, **changes)


def trace(model_config: ModelConfig, train: TrainConfig) -> dict:
    """Find the peak of a step and of a validation [bytes], and operators that mix devices or wait."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from llmlib import optim, step
    from llmlib.model import build_model

    class Watch(TorchDispatchMode):
        """Follow the storages that live on the device, and look at every operator's devices."""

        now, peak, live, mixed, waits = 0, 0, set(), set(), set()

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result, name = operator(*args, **(kwargs or {})), str(operator)
            is_tensor = lambda x: isinstance(x, torch.Tensor)  # noqa: E731
            given, made = (filter(is_tensor, tree_leaves(x)) for x in ((args, kwargs), result))
            devices, made = {t.device.type for t in given}, list(made)
            if len(devices) > 1 and "copy" not in name:
                self.mixed.add(name)
            is_read = any(word in name for word in WAITS) or any(t.is_cpu for t in made)
            if "cuda" in devices and is_read:
                self.waits.add(name)
            for storage in (t.untyped_storage() for t in made if t.is_cuda):
                if storage._cdata not in self.live:
                    self.live.add(storage._cdata)
                    size = -(-storage.nbytes() // 512) * 512  # as it is allocated
                    weakref.finalize(storage, self.forget, storage._cdata, size)
                    self.now += size
                    self.peak = max(self.peak, self.now)
            return result

        def forget(self, key, size):
            self.live.remove(key)
            self.now -= size

    def attend(q, k, v, is_causal):  # the kernel that CUDA would choose
        if q.dtype == torch.float32:
            kernel = torch.ops.aten._scaled_dot_product_efficient_attention
            return kernel(q, k, v, None, True, 0.0, is_causal)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]

    F.scaled_dot_product_attention = attend
    F.rms_norm = lambda x, shape, weight, eps: F.layer_norm(
        x, shape, weight, None, eps
    )  # one kernel
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    optim.Sophia.HESSIAN_INTERVAL = 1
    device, dtype = torch.device("cuda", 0), getattr(torch, train.dtype)
    how = {"micro_batch": train.micro_batch, "grad_clip": 1.0, "lr_factor": 1.0, "dtype": dtype}
    shape = (train.n_sequences, model_config.seq_len + 1)
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        with device:
            model = build_model(model_config)
            tokens = torch.randint(model_config.vocab_size, shape)
        optimizer = optim.build_optimizer(model, train, dtype)
        for _ in range(2):
            watch.peak = watch.now
            numbers = step.train_step(model, optimizer, tokens[:, :-1], tokens[:, 1:], **how)
        found = {"step": watch.peak, "device": str(numbers.device), "state": watch.now}
        found |= {"mixed": sorted(watch.mixed), "waits": sorted(watch.waits)}
        watch.peak = watch.now
        with contextlib.suppress(DataDependentOutputException):  # it reads its sums at the end
            step.evaluate(model, np.zeros((step.EVAL_BATCH, shape[1]), int), device, dtype)
        return found | {"validation": watch.peak}


if __name__ == "__main__":
    for path in (TORCH / "lib/libc10.so", TORCH / "lib/libtorch_cpu.so", sys.argv[1]):
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    print(json.dumps([trace(*configs(*case)) for case in json.loads(sys.argv[2])]))
