"""The format's constants against ml_dtypes and torch, its layouts, and the worked examples."""

import doctest
from types import ModuleType

import independent
import ml_dtypes
import numpy as np
import pytest
import torch

from nvfp4_ops import format as nvfp4
from nvfp4_ops import reference


@pytest.mark.parametrize("module", [nvfp4, reference], ids=["format", "reference"])
def test_format_worked_examples(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_format_e2m1_constants() -> None:
    codes = np.arange(8, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn)
    assert nvfp4.E2M1_VALUES == tuple(codes.astype(float).tolist())
    assert nvfp4.E2M1_MAX == max(nvfp4.E2M1_VALUES)
    assert reference.decode_e2m1(torch.arange(8).byte()).tolist() == list(nvfp4.E2M1_VALUES)


def test_format_e4m3_constants() -> None:
    info = torch.finfo(torch.float8_e4m3fn)
    assert info.max == nvfp4.E4M3_MAX
    assert info.smallest_normal / 8 == nvfp4.E4M3_MIN_SUBNORMAL
    assert np.isnan(independent.decode_e4m3(np.array([nvfp4.E4M3_NAN_BYTE], np.uint8))[0])
    assert nvfp4.GLOBAL_SCALE_DIVISOR == 2688
    assert torch.finfo(torch.float32).smallest_normal == nvfp4.GLOBAL_SCALE_MIN


@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (127, 3), (128, 4), (129, 5), (300, 7), (256, 12)]
)
def test_swizzled_offset_is_a_bijection(rows: int, cols: int) -> None:
    padded_rows, padded_cols = -(-rows // 128) * 128, -(-cols // 4) * 4
    offsets = [
        nvfp4.swizzled_offset(row, col, cols)
        for row in range(padded_rows)
        for col in range(padded_cols)
    ]
    assert sorted(offsets) == list(range(padded_rows * padded_cols))
    assert len(offsets) == np.prod(nvfp4.swizzled_shape((rows, cols)))


@pytest.mark.parametrize(("rows", "cols"), [(129, 5), (300, 7)])
def test_swizzled_offset_inverts_by_the_published_inverse(rows: int, cols: int) -> None:
    col_tiles = -(-cols // 4)
    for row in range(rows):
        for col in range(cols):
            tile, inside = divmod(nvfp4.swizzled_offset(row, col, cols), 512)
            found_row = tile // col_tiles * 128 + inside % 16 // 4 * 32 + inside // 16
            assert (found_row, tile % col_tiles * 4 + inside % 4) == (row, col)
