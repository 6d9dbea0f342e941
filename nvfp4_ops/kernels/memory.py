"""Global memory as kernels without tensor cores see it, and how one kernel follows another."""

from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, Int64, Uint8, Uint32
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels.launch.tensors import (
    CODE_BYTES,
    VECTOR_BYTES,
    WORD_BYTES,
)

DTYPES = {
    torch.bfloat16: cutlass.BFloat16,
    torch.float16: cutlass.Float16,
    torch.float32: cutlass.Float32,
}


def follow_previous_kernel() -> None:
    """Wait for the previous kernel's memory, then let the next kernel's CTAs in.

    Every thread calls this before it reads or writes global memory. In this order the next kernel
    can not run ahead of one before the previous one, whose memory it may read or write.
    """
    cute.arch.griddepcontrol_wait()
    cute.arch.griddepcontrol_launch_dependents()


def vector_at(address: Int64, num_words: int, align: int = VECTOR_BYTES) -> cute.Tensor:
    """Global memory at a byte address as 32-bit words."""
    pointer = cute.make_ptr(Uint32, address, cute.AddressSpace.gmem, assumed_align=align)
    return cute.make_tensor(pointer, cute.make_layout(num_words))


def bytes_at(address: Int64, num_bytes: int) -> cute.Tensor:
    pointer = cute.make_ptr(Uint8, address, cute.AddressSpace.gmem, assumed_align=1)
    return cute.make_tensor(pointer, cute.make_layout(num_bytes))


def store_words(address: Int64, words: list[Uint32]) -> None:
    """One store of up to 16 bytes, aligned to its size."""
    num_words = len(words)
    rWords = cute.make_rmem_tensor(cute.make_layout(num_words), Uint32)
    for i in range(num_words):
        rWords[i] = words[i]
    cute.autovec_copy(rWords, vector_at(address, num_words, num_words * WORD_BYTES))


def store_block(address: Int64, words: list[Uint32]) -> None:
    """The words of a block in one store, or in several of 16 bytes."""
    per_store = VECTOR_BYTES // WORD_BYTES
    for i in range(0, len(words), per_store):
        store_words(address + i * WORD_BYTES, words[i : i + per_store])


def ptx(code: str, result: type, *args: Any) -> Any:
    return cute.arch.inline_ptx(code, write_only_types=[result], read_only_args=list(args))


def permute_bytes(low: Uint32, high: Uint32, selector: int) -> Uint32:
    """Bytes 0..3 of ``low`` and 4..7 of ``high`` chosen by the nibbles of ``selector``."""
    return ptx(f"prmt.b32 {{$w0}}, {{$r0}}, {{$r1}}, {selector:#06x};", Uint32, low, high)


def fake_swizzled(row_tiles: cute.SymInt, col_tiles: cute.SymInt) -> cute.Tensor:
    shape = (row_tiles, col_tiles, nvfp4.SWIZZLE_TILE_BYTES)
    return make_fake_compact_tensor(
        Uint8, shape, stride_order=(2, 1, 0), assumed_align=VECTOR_BYTES
    )


def fake_vector(dtype: type) -> cute.Tensor:
    """(any size,) of 4-byte elements."""
    return make_fake_compact_tensor(dtype, (cute.sym_int32(),), assumed_align=WORD_BYTES)


def fake_offs() -> cute.Tensor:
    return fake_vector(Int32)


def fake_rows(dtype: torch.dtype, rows: cute.SymInt | None = None) -> cute.Tensor:
    """(rows, K), contiguous within a row."""
    rows = cute.sym_int32() if rows is None else rows
    # No divisibility: the stride of a single row means nothing. ``why_no_rows`` checks.
    row_stride = cute.sym_int64()
    k = cute.sym_int32(divisibility=nvfp4.BLOCK_SIZE)
    return make_fake_tensor(DTYPES[dtype], (rows, k), (row_stride, 1), assumed_align=VECTOR_BYTES)


def fake_codes(rows: cute.SymInt) -> cute.Tensor:
    """(rows, K / 2), contiguous."""
    packed_k = cute.sym_int32(divisibility=CODE_BYTES)
    return make_fake_compact_tensor(
        Uint8, (rows, packed_k), stride_order=(1, 0), assumed_align=CODE_BYTES
    )


def fake_values(rows: cute.SymInt) -> cute.Tensor:
    """(rows, K) bf16, contiguous."""
    k = cute.sym_int32(divisibility=nvfp4.BLOCK_SIZE)
    return make_fake_compact_tensor(
        cutlass.BFloat16, (rows, k), stride_order=(1, 0), assumed_align=VECTOR_BYTES
    )
