"""What "equal" and "close enough" mean in these tests: the one place that states a bound.

Quantize, swizzle and permute are compared byte by byte. A matmul may sum in any order, so it is
compared with what PyTorch users have without this package: a bf16 matmul on the decoded operands.
"""

import torch
from torch import Tensor

GEMM_ERROR_FACTOR = 2.0
"""A grouped mm may err this many times as much as bf16 PyTorch on the same decoded operands."""


def _elements_as_bytes(x: Tensor) -> Tensor:
    """(numel, itemsize) uint8."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).view(-1, x.dtype.itemsize)


def assert_bytes_equal(actual: Tensor, expected: Tensor, name: str = "tensor") -> None:
    """Same dtype, shape and bytes: NaNs are compared too, and -0 is not 0."""
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    )
    got, want = _elements_as_bytes(actual), _elements_as_bytes(expected)
    different = (got != want).any(dim=1)
    if not bool(different.any()):
        return
    first = int(different.nonzero()[0])
    coordinate = [int(i) for i in torch.unravel_index(torch.tensor(first), actual.shape)]
    values = [x.detach().cpu()[tuple(coordinate)].double().item() for x in (actual, expected)]
    raise AssertionError(
        f"{name}: {int(different.sum())} of {different.numel()} elements differ, first at "
        f"{coordinate}: got {values[0]} (bytes {bytes(got[first].tolist()).hex()}), "
        f"expected {values[1]} (bytes {bytes(want[first].tolist()).hex()})"
    )


def assert_values_equal(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and values; NaN equals NaN and -0 equals 0."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def bf16_grouped_mm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """(R, N) bf16: what bf16 PyTorch makes of decoded a (R, K) and b (E, N, K), scales included."""
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16, device=a.device)
    ends = offs.tolist()
    for start, end, weight in zip([0, *ends], ends, b, strict=False):
        out[start:end] = a[start:end].bfloat16() @ weight.bfloat16().T
    return out


def _gemm_error(out: Tensor, exact: Tensor) -> float:
    """Largest error of an element, relative to the largest magnitude of its row."""
    row_amax = exact.abs().amax(dim=1, keepdim=True)
    row_amax = torch.where(row_amax == 0, 1.0, row_amax)
    return float(((out.double() - exact).abs() / row_amax).max())


def assert_gemm_close(actual: Tensor, exact: Tensor, bf16_pytorch: Tensor) -> None:
    """Error of ``actual`` is at most GEMM_ERROR_FACTOR times that of ``bf16_pytorch``.

    exact: (R, N) float64. All three finite.
    """
    assert actual.shape == exact.shape == bf16_pytorch.shape
    if exact.numel() == 0:
        return
    error, bound = _gemm_error(actual, exact), GEMM_ERROR_FACTOR * _gemm_error(bf16_pytorch, exact)
    assert error <= bound, f"error {error:.3e}, more than the bound {bound:.3e}"
