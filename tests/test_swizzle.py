"""swizzle_sf and unswizzle_sf: the byte formula, ragged tiles, pads, and torchao's layout."""

import itertools
from types import ModuleType

import independent
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops import swizzle_sf, unswizzle_sf

SHAPES = [(1, 1), (32, 4), (127, 3), (128, 4), (129, 5), (300, 7), (300, 64)]

# Rows per expert; the last two leave rows that belong to no expert.
RAGGED: dict[str, tuple[list[int], int]] = {
    "docstring": ([2, 0, 130], 132),
    "tile edges": ([1, 127, 128, 129], 385),
    "one expert": ([130], 130),
    "all on one": ([0, 0, 200, 0], 200),
    "torchao's": ([5, 0, 128, 167, 0, 128], 428),
    "rows past the end": ([3, 0, 140], 200),
    "no row of an expert": ([0, 0], 70),
}
every_ragged = pytest.mark.parametrize(("counts", "rows"), RAGGED.values(), ids=RAGGED.keys())


def random_sf(*shape: int) -> Tensor:
    """Any bytes but zero, so that a scale is never mistaken for a pad; NaN among them."""
    return torch.randint(1, 256, shape).to(torch.uint8).view(torch.float8_e4m3fn)


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def flat_bytes(sf: Tensor) -> np.ndarray:
    return sf.view(torch.uint8).flatten().numpy()


def assert_same_bytes(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    np.testing.assert_array_equal(flat_bytes(got), flat_bytes(expected))


# The formula


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swizzle_byte_formula(shape: tuple[int, int]) -> None:
    sf = random_sf(*shape)
    got = swizzle_sf(sf)
    assert got.shape == (-(-shape[0] // 128), -(-shape[1] // 4), 32, 16)
    np.testing.assert_array_equal(
        flat_bytes(got), independent.swizzle(flat_bytes(sf).reshape(shape))
    )


def test_swizzle_agrees_with_the_offset_of_the_format() -> None:
    sf = random_sf(200, 7)
    swizzled = flat_bytes(swizzle_sf(sf))
    for row, col in itertools.product(range(200), range(7)):
        assert swizzled[nvfp4.swizzled_offset(row, col, 7)] == int(sf.view(torch.uint8)[row, col])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swizzle_pads_are_zero(shape: tuple[int, int]) -> None:
    assert np.count_nonzero(flat_bytes(swizzle_sf(random_sf(*shape)))) == shape[0] * shape[1]


def test_swizzle_weights_expert_by_expert() -> None:
    sf = random_sf(3, 130, 5)
    expected = [independent.swizzle(flat_bytes(expert).reshape(130, 5)) for expert in sf]
    got = swizzle_sf(sf)
    assert got.shape == (3 * 2, 2, 32, 16)
    np.testing.assert_array_equal(flat_bytes(got), np.concatenate(expected))


def test_swizzle_takes_any_strides() -> None:
    base = random_sf(140, 80)
    for view in (base.T, base[:, ::3], base[5::2], base[:1].expand(130, -1)):
        assert_same_bytes(swizzle_sf(view), swizzle_sf(view.contiguous()))
    experts = base.view(2, 70, 80).transpose(1, 2)
    assert_same_bytes(swizzle_sf(experts), swizzle_sf(experts.contiguous()))


# Ragged rows


def test_swizzle_ragged_worked_example() -> None:
    """Rows per expert [2, 0, 130] (offs [2, 2, 132]) start on tiles 0, 1, 1 of 4."""
    sf = torch.zeros(132, 4).to(torch.float8_e4m3fn)
    sf[:, 0] = torch.arange(1, 133).to(torch.uint8).view(torch.float8_e4m3fn)
    tiles = swizzle_sf(sf, torch.tensor([2, 2, 132], dtype=torch.int32)).view(torch.uint8)
    assert tiles.shape == (4, 1, 32, 16)
    # Line 0 of a tile: rows 0, 32, 64 and 96 of it, four columns each.
    assert tiles[0, 0, 0].tolist() == [1] + [0] * 15
    assert tiles[1, 0, 0].tolist() == [3, 0, 0, 0, 35, 0, 0, 0, 67, 0, 0, 0, 99, 0, 0, 0]
    assert tiles[2, 0, :3, 0].tolist() == [131, 132, 0]
    assert not tiles[3].any()


@every_ragged
def test_swizzle_ragged_byte_formula(counts: list[int], rows: int) -> None:
    sf, offs = random_sf(rows, 5), ends_of(counts)
    got = swizzle_sf(sf, offs)
    expected = independent.swizzle_ragged(flat_bytes(sf).reshape(rows, 5), offs.tolist())
    np.testing.assert_array_equal(flat_bytes(got), expected)
    assert np.count_nonzero(flat_bytes(got)) == sum(counts) * 5, "pads are zero"


@every_ragged
def test_unswizzle_ragged_is_the_inverse(counts: list[int], rows: int) -> None:
    sf, offs = random_sf(rows, 5), ends_of(counts)
    expected = sf.clone()
    expected.view(torch.uint8)[sum(counts) :] = 0
    assert_same_bytes(unswizzle_sf(swizzle_sf(sf, offs), (rows, 5), offs), expected)


def test_unswizzle_ignores_pads() -> None:
    """Pads that hold NaN do not reach the linear scales."""
    sf, offs = random_sf(132, 5), ends_of([2, 0, 130])
    poisoned = swizzle_sf(sf, offs).view(torch.uint8)
    poisoned[poisoned == 0] = nvfp4.E4M3_NAN_BYTE
    got = unswizzle_sf(poisoned.view(torch.float8_e4m3fn), (132, 5), offs)
    assert_same_bytes(got, sf)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 260), min_size=1, max_size=5), st.integers(0, 9), st.integers(1, 9))
def test_swizzle_ragged_round_trip(counts: list[int], past_end: int, cols: int) -> None:
    offs, rows = ends_of(counts), sum(counts) + max(past_end, 1)
    sf = random_sf(rows, cols)
    expected = sf.clone()
    expected.view(torch.uint8)[sum(counts) :] = 0
    assert_same_bytes(unswizzle_sf(swizzle_sf(sf, offs), (rows, cols), offs), expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from([(), (1,), (3,)]), st.integers(1, 300), st.integers(1, 9))
def test_swizzle_round_trip(experts: tuple[int, ...], rows: int, cols: int) -> None:
    sf = random_sf(*experts, rows, cols)
    assert_same_bytes(unswizzle_sf(swizzle_sf(sf), tuple(sf.shape)), sf)


@pytest.mark.parametrize(
    ("shape", "offs"),
    [((0, 3), None), ((0, 3), [0]), ((0, 3), [0, 0]), ((2, 0, 3), None), ((0, 5, 3), None)],
    ids=["no rows", "no rows of 1 expert", "no rows of 2 experts", "N = 0", "E = 0"],
)
def test_swizzle_round_trip_without_rows(shape: tuple[int, ...], offs: list[int] | None) -> None:
    ends = None if offs is None else torch.tensor(offs, dtype=torch.int32)
    sf = random_sf(*shape)
    swizzled = swizzle_sf(sf, ends)
    assert swizzled.shape == nvfp4.swizzled_shape(shape, None if offs is None else len(offs))
    assert not swizzled.view(torch.uint8).any()
    assert unswizzle_sf(swizzled, shape, ends).shape == shape


# The bound


def tiles_needed(counts: tuple[int, ...]) -> int:
    return sum(-(-count // 128) for count in counts)


def test_swizzled_tile_bound_is_never_exceeded() -> None:
    edges = [0, 1, 2, 126, 127, 128, 129, 130, 255, 256, 257]
    for num_experts in (1, 2, 3, 4):
        for counts in itertools.product(edges, repeat=num_experts):
            assert tiles_needed(counts) <= nvfp4.swizzled_tile_bound(sum(counts), num_experts)


@pytest.mark.parametrize("num_experts", [1, 2, 3, 8, 128])
def test_swizzled_tile_bound_is_reached(num_experts: int) -> None:
    """By one row on every expert but the last, for any number of rows >= experts."""
    for rows in range(num_experts, num_experts + 400):
        counts = (1,) * (num_experts - 1) + (rows - num_experts + 1,)
        assert tiles_needed(counts) == nvfp4.swizzled_tile_bound(rows, num_experts)


# Bad input

SF, OFFS = random_sf(5, 3), torch.tensor([2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("sf", "offs", "error", "message"),
    [
        (swizzle_sf(SF), None, ValueError, "sf: must be linear, .*rank 4 is swizzled already"),
        (SF[0], None, ValueError, r"sf: must be linear, \(R, K/16\) .* got shape \(3,\)$"),
        (SF.float(), None, TypeError, "sf: must be float8_e4m3fn, got float32"),
        (SF[None], OFFS, ValueError, r"offs: goes with scales \(R, K/16\) only"),
        (SF, OFFS.flip(0), ValueError, r"offs: .*non-decreasing.*got \[5, 2\]"),
        (SF[:4], OFFS, ValueError, r"offs: .*number of rows \(4\), got \[2, 5\]"),
        (SF, OFFS.long(), TypeError, "offs: must be int32, got int64"),
        (SF, OFFS[:0], ValueError, "offs: must have at least one expert"),
    ],
    ids=["swizzled", "rank 1", "dtype", "experts", "decreasing", "past R", "int64", "empty"],
)
def test_swizzle_rejects(
    sf: Tensor, offs: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        swizzle_sf(sf, offs)


@pytest.mark.parametrize(
    ("sf", "shape", "offs", "error", "message"),
    [
        (
            SF,
            (5, 3),
            None,
            ValueError,
            r"sf: must be swizzled .*got shape \(5, 3\), which is linear",
        ),
        (SF[None], (1, 5, 3), None, ValueError, r"sf: must be swizzled .* which is linear"),
        (swizzle_sf(SF), (5, 5), None, ValueError, r"swizzled = \(1, 2, 32, 16\), got shape"),
        (swizzle_sf(SF), (129, 3), None, ValueError, r"swizzled = \(2, 1, 32, 16\), got shape"),
        (swizzle_sf(SF), (5, 3), OFFS, ValueError, r"swizzled = \(2, 1, 32, 16\), got .*\(1, 1,"),
        (swizzle_sf(SF), (3,), None, ValueError, r"shape: must be \(R, K/16\) .* got \(3,\)"),
        (swizzle_sf(SF), (1, 5, 3), OFFS, ValueError, r"offs: goes with scales \(R, K/16\) only"),
        (swizzle_sf(SF, OFFS), (4, 3), OFFS, ValueError, r"offs: .*number of rows \(4\), got"),
        (swizzle_sf(SF).float(), (5, 3), None, TypeError, "sf: must be float8_e4m3fn, got float32"),
    ],
    ids=[
        "linear",
        "linear experts",
        "columns",
        "rows",
        "not ragged",
        "rank",
        "experts",
        "past R",
        "dtype",
    ],
)
def test_unswizzle_rejects(
    sf: Tensor, shape: tuple[int, ...], offs: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        unswizzle_sf(sf, shape, offs)


# torchao


@pytest.fixture(scope="module")
def torchao_layout() -> ModuleType:
    return pytest.importorskip("torchao.prototype.mx_formats.utils", exc_type=ImportError)


@pytest.mark.parametrize("shape", [*SHAPES, (1000, 33)], ids=str)
def test_swizzle_agrees_with_torchao(torchao_layout: ModuleType, shape: tuple[int, int]) -> None:
    sf = random_sf(*shape)
    theirs = torchao_layout.to_blocked(sf.view(torch.uint8))
    np.testing.assert_array_equal(flat_bytes(swizzle_sf(sf)), theirs.numpy())
    back = torchao_layout.from_blocked(swizzle_sf(sf).view(torch.uint8).flatten(), *shape)
    np.testing.assert_array_equal(back.flatten().numpy(), flat_bytes(sf))


@every_ragged
def test_swizzle_ragged_agrees_with_torchao(counts: list[int], rows: int) -> None:
    """torchao allocates 128 rows more per expert, we fewer; the tiles in use are the same."""
    torchao = pytest.importorskip(
        "torchao.prototype.moe_training.kernels.mxfp8.quant", exc_type=ImportError
    )
    sf, offs = random_sf(rows, 8)[: sum(counts)], ends_of(counts)
    theirs, starts = torchao.torch_to_blocked_2d_M_groups(sf.view(torch.uint8), offs)
    in_use = int(starts[-1]) * 8
    assert in_use == tiles_needed(tuple(counts)) * 128 * 8
    ours = flat_bytes(swizzle_sf(sf, offs)) if sum(counts) else np.zeros(0)
    np.testing.assert_array_equal(ours[:in_use], theirs.flatten().numpy()[:in_use])
    assert not ours[in_use:].any()
