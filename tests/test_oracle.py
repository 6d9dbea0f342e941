"""The oracle itself: the narrow types of ``reference``, enumerated completely."""

import independent
import ml_dtypes
import numpy as np
import pytest
import torch
from independent import Bytes, Floats

from nvfp4_ops import reference

ALL_BF16 = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)

# midpoint: (code below, code at the tie, code above)
E2M1_TIES = {
    0.25: (0, 0, 1),  # 0 and 0.5: code 0 is even
    0.75: (1, 2, 2),  # 0.5 and 1: code 2
    1.25: (2, 2, 3),  # 1 and 1.5
    1.75: (3, 4, 4),  # 1.5 and 2
    2.5: (4, 4, 5),  # 2 and 3
    3.5: (5, 6, 6),  # 3 and 4
    5.0: (6, 6, 7),  # 4 and 6
}


def encode_e2m1(values: Floats) -> Bytes:
    return reference.encode_e2m1(torch.from_numpy(values)).numpy()


def encode_e4m3(values: Floats) -> Bytes:
    return reference.encode_e4m3(torch.from_numpy(values)).view(torch.uint8).numpy()


def below_at_above(value: float) -> Floats:
    middle = np.float32(value)
    return np.array([np.nextafter(middle, -np.inf), middle, np.nextafter(middle, np.inf)])


def every_product(dtype: torch.dtype) -> torch.Tensor:
    """(256, 16): row = scale byte, column = code, decoded by the reference."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(256, 1)
    sf = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).unsqueeze(1)
    return reference.decode_blocks(reference.pack_codes(codes), sf, dtype)


def every_product_independent() -> Floats:
    codes = independent.decode_e2m1(np.arange(16, dtype=np.uint8))
    return np.outer(independent.decode_e4m3(np.arange(256, dtype=np.uint8)), codes)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.float64], ids=["bf16", "fp32", "fp64"]
)
def test_decode_blocks_every_code_and_scale(dtype: torch.dtype) -> None:
    got, expected = every_product(dtype).double().numpy(), every_product_independent()
    is_nan = np.isnan(expected)
    # Bytes 0x7F and 0xFF are the NaN scales, and NaN times any code is NaN.
    assert np.argwhere(is_nan.any(axis=1)).flatten().tolist() == [0x7F, 0xFF]
    np.testing.assert_array_equal(np.isnan(got), is_nan)
    # As bits, so that -0 counts.
    np.testing.assert_array_equal(got[~is_nan].view(np.int64), expected[~is_nan].view(np.int64))


def test_decode_blocks_products_have_six_significant_bits() -> None:
    expected = every_product_independent()
    mantissa, _ = np.frexp(expected[~np.isnan(expected)])
    np.testing.assert_array_equal(mantissa * 64, np.round(mantissa * 64))
    assert np.any(mantissa * 32 != np.round(mantissa * 32))  # six are needed


@pytest.mark.parametrize("midpoint", E2M1_TIES, ids=str)
def test_encode_e2m1_ties_go_to_even(midpoint: float) -> None:
    positive = below_at_above(midpoint)
    assert encode_e2m1(positive).tolist() == list(E2M1_TIES[midpoint])
    assert encode_e2m1(-positive).tolist() == [8 + code for code in E2M1_TIES[midpoint]]


def test_encode_e2m1_keeps_its_own_values() -> None:
    codes = np.arange(16, dtype=np.uint8)
    values = independent.decode_e2m1(codes).astype(np.float32)
    np.testing.assert_array_equal(encode_e2m1(values), codes)


def test_encode_e2m1_special_values() -> None:
    values = np.array([np.nan, -np.nan, np.inf, -np.inf, 1e38, -7, -0.0, -1e-45, 1e-45], np.float32)
    assert encode_e2m1(values).tolist() == [7, 7, 7, 15, 7, 15, 8, 8, 0]


def test_encode_e2m1_every_bf16() -> None:
    np.testing.assert_array_equal(encode_e2m1(ALL_BF16), independent.encode_e2m1(ALL_BF16))


def test_encode_e4m3_every_midpoint() -> None:
    """Between bytes b and b + 1 the tie is the even one of them; the neighbours are not ties."""
    for byte in range(0x7E):
        low, high = independent.decode_e4m3(np.array([byte, byte + 1], np.uint8))
        expected = [byte, byte + byte % 2, byte + 1]
        values = below_at_above((low + high) / 2)
        assert encode_e4m3(values).tolist() == expected
        assert encode_e4m3(-values).tolist() == [0x80 + code for code in expected]


def test_encode_e4m3_keeps_its_own_values() -> None:
    sf_bytes = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])
    values = independent.decode_e4m3(sf_bytes).astype(np.float32)
    np.testing.assert_array_equal(encode_e4m3(values), sf_bytes)


@pytest.mark.parametrize("boundary", [448, 464, 480, 1e30, np.inf], ids=str)
def test_encode_e4m3_saturates(boundary: float) -> None:
    """464 would be the tie between 448 and the first value that does not exist, 480."""
    values = below_at_above(boundary)
    assert encode_e4m3(values).tolist() == [0x7E] * 3
    assert encode_e4m3(-values).tolist() == [0xFE] * 3


def test_encode_e4m3_nan_is_canonical() -> None:
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert encode_e4m3(nans).tolist() == [0x7F] * 4


def test_encode_e4m3_every_bf16() -> None:
    np.testing.assert_array_equal(encode_e4m3(ALL_BF16), independent.encode_e4m3(ALL_BF16))


def test_pack_codes_every_byte() -> None:
    every_byte = np.arange(256, dtype=np.uint8).reshape(8, 32)
    codes = reference.unpack_codes(torch.from_numpy(every_byte))
    np.testing.assert_array_equal(codes.numpy(), independent.unpack(every_byte))
    np.testing.assert_array_equal(reference.pack_codes(codes).numpy(), every_byte)
    np.testing.assert_array_equal(independent.pack(codes.numpy()), every_byte)


def test_pack_codes_even_element_is_the_low_nibble() -> None:
    packed = reference.pack_codes(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8))
    assert packed.tolist() == [[0x21, 0x0F]]
