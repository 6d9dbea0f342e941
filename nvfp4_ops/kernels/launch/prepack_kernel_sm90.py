"""Launches of ``prepack_kernel_sm90``, in both directions."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nvfp4_ops.kernels.launch.tensors import WORD_BYTES, GetCompiled
from nvfp4_ops.kernels.prepack_sm90 import GATED_RANK

LANE_BYTES = 8
"""Of codes, that a lane reads or writes at once."""


@dataclass(frozen=True)
class PrepackConfig:
    """Static configuration.

    direction: which way. gated: order of the rows (see prepack_sm90).
    sf_words: rows of block scales are whole 32-bit words, aligned; else they are moved as bytes.
    """

    direction: Literal["prepack", "unpack"]
    gated: bool
    sf_words: bool


def _launch(
    direction: Literal["prepack", "unpack"],
    codes: Tensor,
    block_scale: Tensor,
    packed: Tensor,
    get_compiled: GetCompiled,
) -> None:
    if codes.numel() == 0:
        return
    gated = packed.ndim == GATED_RANK
    sf = block_scale.view(torch.uint8)
    sf_words = sf.shape[-1] % WORD_BYTES == 0 and sf.data_ptr() % WORD_BYTES == 0
    blocks = packed.flatten(1, 2) if gated else packed
    get_compiled(PrepackConfig(direction, gated, sf_words))(codes, sf, blocks)


def launch_prepack(
    *, codes: Tensor, block_scale: Tensor, packed: Tensor, get_compiled: GetCompiled
) -> None:
    """packed = prepack(codes, block_scale), every byte of it written.

    codes: (E, N, K/2) uint8, contiguous, 8-byte aligned. block_scale: (E, N, K/16) float8_e4m3fn,
    contiguous. packed: of ``prepacked_shape``, whose rank says whether gate and up rows are paired.
    get_compiled: from a ``PrepackConfig`` to what ``build`` returns for it.
    """
    _launch("prepack", codes, block_scale, packed, get_compiled)


def launch_unpack(
    *, packed: Tensor, codes: Tensor, block_scale: Tensor, get_compiled: GetCompiled
) -> None:
    """codes, block_scale = unpack(packed), every byte of both written; else as above."""
    _launch("unpack", codes, block_scale, packed, get_compiled)
