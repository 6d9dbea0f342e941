"""Launches of ``per_token``: to codes and block scales, or to values."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels.launch.tensors import (
    WARP,
    WORD_BYTES,
    GetCompiled,
    Launch,
    is_gated,
    why_no_rows,
)

MIN_WARPS, MAX_WARPS = 4, 8
# Registers of a lane that hold its inputs.
_MAX_INPUT_WORDS = 64


@dataclass(frozen=True)
class PerTokenConfig:
    """activation, limit: applied to x first. A row is row_warps * 32 * blocks_per_lane blocks.

    values, gather: as ``QuantizeConfig``'s.
    """

    dtype: torch.dtype
    ragged: bool
    row_warps: int
    blocks_per_lane: int
    activation: str = "none"
    limit: float | None = None
    values: bool = False
    gather: bool = False

    @property
    def warps(self) -> int:
        """Of a CTA: small ones come and go more evenly."""
        return max(MIN_WARPS, self.row_warps)


@cache
def choose_config(
    dtype: torch.dtype,
    k: int,
    *,
    ragged: bool = False,
    activation: str = "none",
    limit: float | None = None,
    values: bool = False,
    gather: bool = False,
) -> PerTokenConfig | None:
    """Fewest idle lanes, then fewest warps a row: a lane's scales serve as many blocks as fit its
    registers, and fewer warps wait for each other. None where a row does not fit.

    >>> [choose_config(torch.bfloat16, k).row_warps for k in (512, 2048, 2880, 7168, 16384)]
    [1, 1, 2, 4, 8]
    """
    num_cols = nvfp4.num_blocks(k)
    block_words = (
        nvfp4.BLOCK_SIZE * dtype.itemsize // WORD_BYTES * (2 if is_gated(activation) else 1)
    )
    shapes = [
        (row_warps, blocks_per_lane)
        for row_warps in (1, 2, 4, 8)
        for blocks_per_lane in range(1, min(4, _MAX_INPUT_WORDS // block_words) + 1)
        if row_warps * blocks_per_lane * WARP >= num_cols
    ]
    if not shapes:
        return None
    row_warps, blocks_per_lane = min(shapes, key=lambda shape: (shape[0] * shape[1], shape[0]))
    return PerTokenConfig(
        dtype, ragged, row_warps, blocks_per_lane, activation, limit, values, gather
    )


def prepare_quantize_per_token(
    x: Tensor, config: PerTokenConfig, get_compiled: GetCompiled
) -> Launch:
    """codes, block_scale, row_scale = quantize_per_token_nvfp4(x, offs), every byte written.

    x: (R, K), with a gated activation (R, 2 K), with ``why_no_rows(x)`` None. config: of
    ``choose_config``. get_compiled: from a config to what ``build`` returns for it.

    Returns launch(x, offs (E,) int32 or None, codes (R, K / 2) uint8, block_scale (R, K / 16),
    row_scale (R, 1) fp32), all contiguous.
    """
    reason = why_no_rows(x)
    if reason is not None:
        raise ValueError(f"x: {reason}")
    compiled = get_compiled(config)

    def launch(
        x: Tensor, offs: Tensor | None, codes: Tensor, block_scale: Tensor, row_scale: Tensor
    ) -> None:
        compiled(x, offs, None, codes, block_scale.view(torch.uint8), row_scale.ravel())

    return launch


def prepare_round_per_token(x: Tensor, config: PerTokenConfig, get_compiled: GetCompiled) -> Launch:
    """out, row_scale = round_per_token_nvfp4(x, offs, token_of_row), every byte written.

    As ``prepare_quantize_per_token``, but it returns launch(x, offs, token_of_row (R,) int32 or
    None, out (R, K) bf16, row_scale), all contiguous.
    """
    reason = why_no_rows(x)
    if reason is not None:
        raise ValueError(f"x: {reason}")
    compiled = get_compiled(config)

    def launch(
        x: Tensor,
        offs: Tensor | None,
        token_of_row: Tensor | None,
        out: Tensor,
        row_scale: Tensor,
    ) -> None:
        compiled(x, offs, token_of_row, out, None, row_scale.ravel())

    return launch
