"""Host code of the GPU path, run on the CPU: tensors claim to be on a GPU, kernels do nothing.

Every kernel asked for is replaced by one that notes what it is launched with.
"""

from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_ops import kernels, plans
from nvfp4_ops.kernels import compile_cache
from nvfp4_ops.kernels.launch import amax, combine_rows, permute_rows, quantize_rows

DEVICE = torch.device("cuda", 0)
NUM_MULTIPROCESSORS = 132


class Launches:
    """What was launched, and how often a kernel was asked for."""

    def __init__(self) -> None:
        self.launched: list[Hashable] = []
        self.num_requests = 0

    def get(
        self, op: str, config: Hashable, arch: str, build: Callable[[], object]
    ) -> Callable[..., None]:
        self.num_requests += 1

        def kernel(*args: Any) -> None:
            self.launched.append((op, config, *map(describe, args)))

        return kernel

    def take(self) -> list[Hashable]:
        """All since the last time."""
        taken, self.launched = self.launched, []
        return taken


def describe(arg: object) -> Hashable:
    if isinstance(arg, Tensor):
        return (tuple(arg.shape), arg.stride(), arg.dtype)
    # An address differs from call to call.
    return "address" if isinstance(arg, int) and arg > 1 << 32 else arg


def pretend(monkeypatch: pytest.MonkeyPatch) -> Launches:
    launches = Launches()
    plans.clear()
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(Tensor, "device", property(lambda self: DEVICE))
    monkeypatch.setattr(kernels, "why_no_kernels", lambda device: None)
    for module in (kernels, amax, combine_rows, permute_rows, quantize_rows):
        monkeypatch.setattr(module, "num_multiprocessors", lambda device: NUM_MULTIPROCESSORS)
    monkeypatch.setattr(compile_cache, "get", launches.get)
    return launches
