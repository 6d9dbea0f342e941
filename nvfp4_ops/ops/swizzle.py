"""swizzle_sf and unswizzle_sf: block scales to and from the 128x4 layout of tensor cores."""

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops import kernels, reference
from nvfp4_ops.plans import Run
from nvfp4_ops.registry import (
    check_dtype,
    check_offs,
    check_same_device,
    check_shape,
    register,
    shape_text,
)


def _check_offs(offs: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    if offs is None:
        return
    if len(shape) == 3:
        raise ValueError("offs: goes with scales (R, K/16) only, got (E, N, K/16)")
    check_offs(offs, shape[0])
    check_same_device("offs", offs, device)


def _swizzled_shape(shape: tuple[int, ...], offs: Tensor | None) -> tuple[int, ...]:
    return nvfp4.swizzled_shape(shape, None if offs is None else offs.shape[0])


def _check_swizzle(sf: Tensor, offs: Tensor | None) -> None:
    check_dtype("sf", sf, torch.float8_e4m3fn)
    if sf.ndim not in (2, 3):
        hint = "; rank 4 is swizzled already" if sf.ndim == 4 else ""
        raise ValueError(
            f"sf: must be linear, (R, K/16) or (E, N, K/16), got {shape_text(sf)}{hint}"
        )
    _check_offs(offs, sf.shape, sf.device)


def _fake_swizzle(sf: Tensor, offs: Tensor | None = None) -> Tensor:
    _check_swizzle(sf, offs)
    return sf.new_empty(_swizzled_shape(sf.shape, offs))


def _plan_swizzle(sf: Tensor, offs: Tensor | None = None) -> Run | None:
    _check_swizzle(sf, offs)
    if not kernels.has_elementwise(sf, offs):
        return None
    shape = _swizzled_shape(sf.shape, offs)
    launch = kernels.prepare_swizzle(sf, offs)

    def run(sf: Tensor, offs: Tensor | None = None) -> Tensor:
        swizzled = sf.new_empty(*shape)
        launch(sf, swizzled, offs)
        return swizzled

    return run


_op_swizzle = register(
    "swizzle_sf(Tensor sf, Tensor? offs=None) -> Tensor",
    fake=_fake_swizzle,
    kernel=reference.swizzle_sf,
    plan=_plan_swizzle,
)


def swizzle_sf(sf: Tensor, offs: Tensor | None = None) -> Tensor:
    """Rearrange linear block scales into the 128x4 layout (SWIZZLE_32_4_4).

    Scale (r, c) goes to byte

        ((r // 128) * ceil(C / 4) + c // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4

    With ``offs`` the rows are ragged: expert e starts on row tile sum over i < e of
    ceil(m_i / 128), where m_i are the rows per expert, as ``torch.nn.functional.scaled_grouped_mm``
    expects. Rows per expert [2, 0, 130] (offs [2, 2, 132]) start on tiles 0, 1, 1 of 4. The number
    of tiles is the bound floor((R + 127 E) / 128), known without reading ``offs``. Every byte that
    no scale goes to is zero.

    Args:
        sf: (R, C) float8_e4m3fn or, for weights, (E, N, C): each expert is swizzled on its own.
        offs: (E,) int32 end row of each expert. Rows from ``offs[-1]`` on are dropped.

    Returns:
        (row tiles, ceil(C / 4), 32, 16) float8_e4m3fn.

    Raises:
        TypeError: sf is not float8_e4m3fn or offs not int32.
        ValueError: sf is swizzled already (rank 4), or has another rank.
    """
    return _op_swizzle(sf, offs)


def _check_unswizzle(sf: Tensor, shape: tuple[int, ...], offs: Tensor | None) -> None:
    check_dtype("sf", sf, torch.float8_e4m3fn)
    if len(shape) not in (2, 3):
        raise ValueError(f"shape: must be (R, K/16) or (E, N, K/16), got {tuple(shape)}")
    _check_offs(offs, tuple(shape), sf.device)
    if sf.ndim in (2, 3):
        raise ValueError(
            f"sf: must be swizzled (row tiles, column tiles, 32, 16), got {shape_text(sf)}, "
            "which is linear; swizzle_sf makes it swizzled"
        )
    check_shape("sf", sf, _swizzled_shape(tuple(shape), offs), "swizzled")


def _fake_unswizzle(sf: Tensor, shape: tuple[int, ...], offs: Tensor | None = None) -> Tensor:
    _check_unswizzle(sf, shape, offs)
    return sf.new_empty(tuple(shape))


def _kernel_unswizzle(sf: Tensor, shape: tuple[int, ...], offs: Tensor | None = None) -> Tensor:
    _check_unswizzle(sf, shape, offs)
    linear = sf.new_empty(tuple(shape))
    if not kernels.has_elementwise(linear, offs):
        return reference.unswizzle_sf(sf, tuple(shape), offs)
    kernels.unswizzle(sf, offs, linear)
    return linear


_op_unswizzle = register(
    "unswizzle_sf(Tensor sf, SymInt[] shape, Tensor? offs=None) -> Tensor",
    fake=_fake_unswizzle,
    kernel=_kernel_unswizzle,
)


def unswizzle_sf(sf: Tensor, shape: tuple[int, ...], offs: Tensor | None = None) -> Tensor:
    """Inverse of ``swizzle_sf``.

    Args:
        sf: (row tiles, ceil(C / 4), 32, 16) float8_e4m3fn.
        shape: of the linear scales: (R, C) or, for weights, (E, N, C).
        offs: (E,) int32, as given to ``swizzle_sf``.

    Returns:
        ``shape`` float8_e4m3fn. Rows from ``offs[-1]`` on are zero.

    Raises:
        TypeError: sf is not float8_e4m3fn or offs not int32.
        ValueError: sf is linear, or not the swizzled form of ``shape``.
    """
    return _op_unswizzle(sf, shape, offs)
