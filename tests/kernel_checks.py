"""What the tests of kernels share: facts of compiled code, and inputs that are hard to quantize."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

NAN, INF = float("nan"), float("inf")
POISON = 0xAA


def config_id(config: Any) -> str:
    values = vars(config).items()
    return "-".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in values)


def _attributes(cubin: bytes, wanted: int) -> Iterator[int]:
    """Value that each function of a cubin has of an attribute, in its .nv.info section."""
    (section_table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQ", cubin, section_table + i * entry_size) for i in range(count)
    ]
    names_at = headers[names_index][4]
    for name, _, _, _, start, size in headers:
        end_of_name = cubin.index(b"\0", names_at + name)
        if cubin[names_at + name : end_of_name] != b".nv.info":
            continue
        position = start
        while position < start + size:
            kind, attribute, length = struct.unpack_from("<BBH", cubin, position)
            sized = 0x04
            if kind == sized and attribute == wanted:
                yield struct.unpack_from("<II", cubin, position + 4)[1]
            position += 4 + (length if kind == sized else 0)


def frames_and_registers(directory: Path) -> tuple[list[int], int]:
    """Stack frames of all functions in a directory's cubins, and the most registers of one."""
    frame_size, register_count = 0x11, 0x2F
    cubins = [path.read_bytes() for path in directory.glob("*.cubin")]
    frames = [size for cubin in cubins for size in _attributes(cubin, frame_size)]
    return frames, max(count for cubin in cubins for count in _attributes(cubin, register_count))


def assert_follows_previous_kernel(ptx: str) -> None:
    """A thread waits for the previous kernel before it touches memory, then lets the next in."""
    wait, launch = ptx.index("griddepcontrol.wait"), ptx.index("griddepcontrol.launch_dependents")
    accesses = [ptx.find(access) for access in ("ld.global", "st.global")]
    assert wait < launch < min(at for at in accesses if at >= 0)
    # Before both, no branch could skip them.
    assert "bra" not in ptx[ptx.index(".entry") : launch]


def hard_values(rows: int, columns: int) -> torch.Tensor:
    """Normal rows, exact ties, zeros, -0, tiny, huge, Inf and NaN."""
    x = torch.randn(max(rows, 9), columns)
    x[0] = 0.0
    x[1] = -0.0
    x[2] = torch.randint(-12, 13, (columns,)).float() / 2
    x[3] *= 1e-30
    x[4] *= 1e30
    x[5, 3], x[6, 5], x[7, 7] = INF, -INF, NAN
    x[8] = torch.randint(-(1 << 31), (1 << 31) - 1, (columns,)).int().view(torch.float32)
    return x[x.shape[0] - rows :]


def offs_of(num_rows: int, num_experts: int, end: float = 0.9) -> torch.Tensor:
    """Random end rows with empty experts among them, and rows of no expert at the end."""
    ends = torch.randint(0, int(end * num_rows) + 1, (num_experts,)).sort().values.int()
    if num_experts > 2:
        ends[num_experts // 2] = ends[num_experts // 2 - 1]
    return ends


def poisoned(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full(shape, POISON, dtype=torch.uint8, device="cuda")
