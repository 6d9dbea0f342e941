"""dequantize_nvfp4: one rounding in fp32, every form of its scales, and its messages."""

import independent
import numpy as np
import pytest
import torch
from torch import Tensor

from nvfp4_ops import dequantize_nvfp4, quantize_nvfp4, quantize_weight, swizzle_sf

NAN = float("nan")


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.int32).to(torch.uint8)


def random_quantized(rows: int, k: int) -> tuple[Tensor, Tensor]:
    """Any codes, any block scales: negative ones, subnormal ones and NaN too."""
    return random_bytes(rows, k // 2), random_bytes(rows, k // 16).view(torch.float8_e4m3fn)


def expected(codes: Tensor, sf: Tensor, row_scale: Tensor) -> np.ndarray:
    return independent.dequantize(
        codes.numpy(), sf.view(torch.uint8).numpy(), row_scale.expand(len(codes)).numpy()
    )


@pytest.mark.parametrize("scale", [1.0, 0.0123, 1e-38, 1e-44, 3e38], ids=str)
def test_dequantize_rounds_once_in_fp32(scale: float) -> None:
    codes, sf = random_quantized(64, 256)
    got = dequantize_nvfp4(codes, sf, torch.tensor(scale))
    np.testing.assert_array_equal(got.numpy(), expected(codes, sf, torch.tensor([scale])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_dequantize_to_narrow_types_rounds_the_fp32_value(dtype: torch.dtype) -> None:
    codes, sf = random_quantized(64, 256)
    wide, narrow = (
        dequantize_nvfp4(codes, sf, torch.tensor(0.3), dtype=d) for d in (torch.float32, dtype)
    )
    assert narrow.dtype == dtype
    assert torch.equal(narrow.nan_to_num(), wide.to(dtype).nan_to_num())
    assert torch.equal(narrow.isnan(), wide.isnan())


@pytest.mark.parametrize("shape", [(), (5,), (5, 1)], ids=str)
def test_dequantize_scale_per_tensor_and_per_row(shape: tuple[int, ...]) -> None:
    codes, sf = random_quantized(5, 64)
    scale = torch.rand(shape)
    got = dequantize_nvfp4(codes, sf, scale)
    np.testing.assert_array_equal(got.numpy(), expected(codes, sf, scale.flatten()))


def test_dequantize_scale_per_expert() -> None:
    codes, sf = random_quantized(5, 64)
    offs = torch.tensor([2, 2, 5], dtype=torch.int32)
    got = dequantize_nvfp4(codes, sf, torch.tensor([0.5, NAN, 0.3]), offs)
    rows = torch.tensor([0.5, 0.5, 0.3, 0.3, 0.3])
    np.testing.assert_array_equal(got.numpy(), expected(codes, sf, rows))


def test_dequantize_rows_past_the_end_are_zero() -> None:
    x = torch.full((4, 32), NAN)
    x[:3] = 6.0
    offs = torch.tensor([1, 3], dtype=torch.int32)
    scale = torch.tensor([1.0, 2.0])
    for swizzled in (False, True):
        got = dequantize_nvfp4(*quantize_nvfp4(x, scale, offs, swizzled=swizzled), scale, offs)
        assert got[:, 0].tolist() == [6.0, 6.0, 6.0, 0.0]
        assert not got[3].any()


@pytest.mark.parametrize("shape", [(), (3,)], ids=["one scale", "scale per expert"])
def test_dequantize_weights(shape: tuple[int, ...]) -> None:
    codes, sf = random_quantized(3 * 130, 80)
    codes, sf = codes.view(3, 130, 40), sf.view(3, 130, 5)
    scale = torch.rand(shape)
    got = dequantize_nvfp4(codes, sf, scale)
    for expert in range(3):
        one = scale if scale.ndim == 0 else scale[expert]
        np.testing.assert_array_equal(got[expert].numpy(), expected(codes[expert], sf[expert], one))
    assert torch.equal(
        dequantize_nvfp4(codes, swizzle_sf(sf), scale).view(torch.int32), got.view(torch.int32)
    )


@pytest.mark.parametrize("swizzled", [False, True], ids=["linear", "swizzled"])
@pytest.mark.parametrize("ends", [None, [0, 0], [130, 131]], ids=["no offs", "empty", "ragged"])
def test_dequantize_swizzled_equals_linear(ends: list[int] | None, swizzled: bool) -> None:
    codes, sf = random_quantized(131, 80)
    offs = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    inside = 131 if ends is None else ends[-1]
    layout = swizzle_sf(sf, offs) if swizzled else sf
    got = dequantize_nvfp4(codes, layout, torch.tensor(0.1), offs)[:inside]
    np.testing.assert_array_equal(got.numpy(), expected(codes, sf, torch.tensor([0.1]))[:inside])


def test_dequantize_without_rows() -> None:
    codes, sf = random_quantized(0, 64)
    assert dequantize_nvfp4(codes, sf, torch.ones(())).shape == (0, 64)
    assert dequantize_nvfp4(codes, sf, torch.ones(0, 1)).shape == (0, 64)


def test_dequantize_takes_a_quantized_weight() -> None:
    w = torch.randn(2, 24, 64)
    error = dequantize_nvfp4(*quantize_weight(w)) - w
    assert 0.08 < float(error.norm() / w.norm()) < 0.1


CODES, SF = torch.zeros(3, 16, dtype=torch.uint8), torch.zeros(3, 2).to(torch.float8_e4m3fn)
ONE, OFFS = torch.ones(()), torch.tensor([1, 3], dtype=torch.int32)

# name: (codes, block scale, global scale, offs, error, message)
BAD: dict[str, tuple[Tensor, Tensor, Tensor, Tensor | None, type[Exception], str]] = {
    "codes rank": (CODES[0], SF, ONE, None, ValueError, r"codes: must be \(R, K/2\) or .*\(16,\)"),
    "codes dtype": (CODES.int(), SF, ONE, None, TypeError, "codes: must be uint8, got int32"),
    "K/2": (CODES[:, :12], SF, ONE, None, ValueError, "codes: K/2 must be a multiple of 8, got 12"),
    "sf dtype": (CODES, SF.float(), ONE, None, TypeError, "block_scale: must be float8_e4m3fn"),
    "sf rows": (CODES, SF[:2], ONE, None, ValueError, r"block_scale: .*\(3, 2\), got .*\(2, 2\)"),
    "sf columns": (CODES, SF[:, :1], ONE, None, ValueError, r"block_scale: .*got shape \(3, 1\)"),
    "sf rank": (CODES, SF[None], ONE, None, ValueError, r"block_scale: .*got shape \(1, 3, 2\)"),
    "sf ragged": (CODES, swizzle_sf(SF, OFFS), ONE, None, ValueError, r"swizzled = \(1, 1, 32"),
    "scale dtype": (CODES, SF, ONE.half(), None, TypeError, "global_scale: must be float32, got"),
    "scale rows": (CODES, SF, torch.ones(2), None, ValueError, r"R = 3, got shape \(2,\)"),
    "scale (R,) with offs": (CODES, SF, torch.ones(3), OFFS, ValueError, "R = 3, E = 2, got shape"),
    "scale experts": (CODES[None], SF[None], torch.ones(2), None, ValueError, r"\(E,\) = \(1,\)"),
    "offs and weights": (CODES[None], SF[None], ONE, OFFS, ValueError, "offs: goes with codes"),
    "offs past R": (CODES, SF, ONE, OFFS + 1, ValueError, r"offs: .*\(3\), got \[2, 4\]"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "sf", "scale", "offs", "error", "message"), BAD.values(), ids=BAD.keys()
)
def test_dequantize_rejects(
    codes: Tensor,
    sf: Tensor,
    scale: Tensor,
    offs: Tensor | None,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        dequantize_nvfp4(codes, sf, scale, offs)


def test_dequantize_rejects_other_output_types() -> None:
    with pytest.raises(TypeError, match=r"dtype: must be one of .* got torch\.float64"):
        dequantize_nvfp4(CODES, SF, ONE, dtype=torch.float64)
