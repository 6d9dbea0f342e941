"""What every kernel shares of sizes: the most experts, and the size of a GPU."""

from functools import cache

import torch

MAX_EXPERTS = 1024
"""Ragged kernels keep a word or two per expert in shared memory."""


@cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
