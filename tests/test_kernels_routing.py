"""Sort, permute and combine kernels: their PTX run on the CPU, their launches compared on a GPU."""

import os
import re
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_bytes_equal, assert_values_equal
from torch import Tensor

import nvfp4_ops

if not torch.cuda.is_available():
    os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")
pytest.importorskip("cutlass")
pytest.importorskip("tvm_ffi")

from kernel_checks import frames_and_registers
from ptx_machine import Kernel, Memory

from nvfp4_ops.kernels import combine_rows, permute_rows, sort_slots
from nvfp4_ops.kernels.launch.combine_rows import CombineConfig
from nvfp4_ops.kernels.launch.permute_rows import PermuteConfig
from nvfp4_ops.kernels.launch.sort_slots import SortConfig, choose_configs

without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the GPU tests compile and run them"
)
INDEX_DTYPES = (torch.int32, torch.int64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
POISON = 0xAA

SORT_CONFIGS = [
    SortConfig(stage, dtype, max_experts, threads, slots)
    for dtype in INDEX_DTYPES
    for max_experts in (256, 1024)
    for stage, threads, slots in (
        ("whole", max(256, max_experts // 2), 1),
        *(("whole", 1024, slots) for slots in (1, 2, 4)),
        *((stage, 1024, slots) for stage in ("count", "place") for slots in (1, 4, 8)),
    )
]
PERMUTE_CONFIGS = [
    PermuteConfig(width, *load) for width in (1, 4, 16) for load in ((1, 128), (4, 256))
]
COMBINE_CONFIGS = [
    CombineConfig(dtype, weight_dtype, access_bytes or dtype.itemsize, slots_in_flight, 256)
    for dtype in DTYPES
    for weight_dtype in DTYPES
    for access_bytes, slots_in_flight in ((0, 4), (8, 8), (16, 8))
]


def config_id(config: Any) -> str:
    values = "-".join(str(value).removeprefix("torch.") for value in vars(config).values())
    return f"{type(config).__name__.removesuffix('Config').lower()}-{values}"


def build(config: Any, options: str = "") -> Any:
    modules = {SortConfig: sort_slots, PermuteConfig: permute_rows, CombineConfig: combine_rows}
    # Named here too: the DSL may have been imported, and have read the environment, before.
    arch = "" if torch.cuda.is_available() else "--gpu-arch sm_90a "
    return modules[type(config)].build(config, arch + options)


# --- Compiled without a GPU -------------------------------------------------------------------


@without_gpu
@pytest.mark.parametrize(
    "config", [*SORT_CONFIGS, *PERMUTE_CONFIGS, *COMBINE_CONFIGS], ids=config_id
)
def test_routing_kernels_compile_into_registers(config: Any, tmp_path: Path) -> None:
    compiled = build(config, f"--keep-ptx --keep-cubin --dump-dir {tmp_path}")
    frames, registers = frames_and_registers(tmp_path)
    assert frames == [0]
    if isinstance(config, CombineConfig):
        # As many as what is in flight takes, so nothing waits in between.
        assert registers > config.slots_in_flight * (1 + config.access_bytes // 4)
    ptx = compiled.__ptx__
    # Dependents may start once this kernel's own wait is over, never before.
    wait, launch = ptx.index("griddepcontrol.wait"), ptx.index("griddepcontrol.launch_dependents")
    accesses = [match.start() for match in re.finditer(r"(ld|st)\.global", ptx)]
    assert wait < launch < min(accesses)
    for forbidden in ("\tatom.", "\tred.", ".local", ".ftz", "fma.rn.f32"):
        assert forbidden not in ptx


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SortConfig("whole", torch.int16, 256), "index_dtype: must be int32 or int64"),
        (lambda: SortConfig("whole", torch.int32, 512), r"max_experts: must be in \(256, 1024\)"),
        (lambda: SortConfig("whole", torch.int32, 1024, 256), "threads: must .* at least 512"),
        (lambda: SortConfig("count", torch.int32, 256, 1024, 16), "must be 1, 2, 4 or 8, got 16"),
        (lambda: SortConfig("whole", torch.int32, 256, 1024, 8), "up to 4096, got 8192 slots"),
        (lambda: PermuteConfig(8, 1, 128), "access_bytes: must be 1, 4 or 16, got 8"),
        (lambda: CombineConfig(torch.float64, torch.float32, 8, 8, 64), "dtype: must be one of"),
        (lambda: CombineConfig(torch.float32, torch.float32, 2, 8, 64), r"in \(4, 8, 16\), got 2"),
    ],
    ids=[
        "dtype",
        "experts",
        "threads",
        "slots",
        "whole",
        "width",
        "combine-dtype",
        "combine-width",
    ],
)
def test_routing_configs_reject(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("num_slots", "num_experts", "expected"),
    [
        (1, 256, [("whole", 256, 256)]),
        (256, 8, [("whole", 256, 256)]),
        (257, 8, [("whole", 256, 1024)]),
        (512, 257, [("whole", 1024, 512)]),
        (1025, 1, [("whole", 256, 2048)]),
        (2049, 1, [("whole", 256, 4096)]),
        (4096, 1024, [("whole", 1024, 4096)]),
        (4097, 1, [("count", 256, 1024), ("place", 256, 1024)]),
        (1 << 17, 1, [("count", 256, 1024), ("place", 256, 1024)]),
        ((1 << 17) + 1, 1, [("count", 256, 4096), ("place", 256, 4096)]),
        (1 << 21, 1, [("count", 256, 8192), ("place", 256, 8192)]),
    ],
)
def test_sort_takes_one_kernel_where_decoding_waits(
    num_slots: int, num_experts: int, expected: list[tuple[str, int, int]]
) -> None:
    configs = choose_configs(num_slots, num_experts, torch.int64)
    assert [(c.stage, c.max_experts, c.num_slots) for c in configs] == expected


# --- Run on the CPU, instruction by instruction -----------------------------------------------

Run = Callable[..., None]


@pytest.fixture
def run_ptx(tmp_path: Path) -> Run:
    """run_ptx(config, grid, params, memory)."""

    @cache
    def kernel(config: Any) -> Kernel:
        return Kernel(build(config, f"--keep-ptx --dump-dir {tmp_path}").__ptx__)

    def run(config: Any, grid: tuple[int, int], params: list[bytes], memory: Memory) -> None:
        kernel(config).launch(grid, params, memory)

    return run


def argument(address: int, *shape: int, stride: int | None = None) -> bytes:
    """A tensor as a kernel is given it: address, 32-bit sizes, the 64-bit row stride."""
    sizes = struct.pack(f"<q{len(shape)}i", address, *shape)
    aligned = sizes.ljust(-(-len(sizes) // 8) * 8, b"\0")
    return aligned if stride is None else aligned + struct.pack("<q", stride)


def int32(value: int) -> bytes:
    return struct.pack("<i", value)


def int64(value: int) -> bytes:
    return struct.pack("<q", value)


def poisoned(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    out.view(-1).view(torch.uint8).fill_(POISON)
    return out


def sort_on_ptx(
    run_ptx: Run, index: Tensor, num_experts: int, configs: tuple[SortConfig, ...]
) -> None:
    """Bytes of the reference, each written once."""
    memory, num_slots = Memory(), index.numel()
    num_ctas = -(-num_slots // configs[0].num_slots)
    outputs = (poisoned(num_experts), poisoned(num_slots), poisoned(*index.shape))
    addresses = [memory.add(out) for out in outputs]
    index_argument = argument(memory.add(index), num_slots)
    counts = argument(memory.add(poisoned(num_ctas, configs[0].num_pairs)), num_ctas)
    offs, tokens, rows = (
        argument(address, out.numel()) for address, out in zip(addresses, outputs, strict=True)
    )
    sizes = [int32(num_experts), int32(index.shape[1])]
    for config in configs:
        params = {
            "whole": [index_argument, offs, tokens, rows],
            "count": [index_argument, counts],
            "place": [index_argument, counts, offs, tokens, rows],
        }[config.stage]
        run_ptx(config, (num_ctas, 1), [*params, *sizes], memory)
    expected = nvfp4_ops.sort_by_expert(index, num_experts)
    for name, address, wanted in zip(
        ("offs", "token_of_row", "row_of_slot"), addresses, expected, strict=True
    ):
        assert_bytes_equal(memory.get(address, wanted), wanted, name)
        assert memory.writes(address, wanted) == [1], name


def indices(tokens: int, top_k: int, num_experts: int, kind: str = "random") -> Tensor:
    """(tokens, top_k) int64; "random" has some experts of other ranks."""
    if kind == "one":
        return torch.full((tokens, top_k), num_experts - 1)
    if kind == "others":
        return torch.randint(num_experts, 2**31, (tokens, top_k))
    return torch.randint(0, num_experts + 1 + num_experts // 8, (tokens, top_k))


@without_gpu
@pytest.mark.parametrize("kind", ["random", "one", "others"])
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts"),
    [
        (1, 1, 1),
        (1, 8, 128),
        (31, 8, 256),
        (33, 6, 255),
        (32, 16, 1000),
        (129, 8, 8),
        (640, 6, 96),
        (190, 8, 300),
    ],
)
def test_sort_ptx_in_one_cta_gives_the_bytes_of_the_reference(
    run_ptx: Run, tokens: int, top_k: int, num_experts: int, kind: str
) -> None:
    index = indices(tokens, top_k, num_experts, kind)
    for dtype in INDEX_DTYPES:
        configs = choose_configs(index.numel(), num_experts, dtype)
        assert len(configs) == 1
        sort_on_ptx(run_ptx, index.to(dtype), num_experts, configs)


@without_gpu
@pytest.mark.parametrize("kind", ["random", "one", "others"])
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "slots_per_thread"),
    [(1, 1, 1, 1), (1300, 8, 128, 1), (1000, 7, 1000, 1), (1500, 6, 1024, 4), (4100, 8, 3, 8)],
)
def test_sort_ptx_in_several_ctas_gives_the_bytes_of_the_reference(
    run_ptx: Run, tokens: int, top_k: int, num_experts: int, slots_per_thread: int, kind: str
) -> None:
    index = indices(tokens, top_k, num_experts, kind)
    max_experts = 256 if num_experts <= 256 else 1024
    configs = tuple(
        SortConfig(stage, torch.int64, max_experts, 1024, slots_per_thread)
        for stage in ("count", "place")
    )
    sort_on_ptx(run_ptx, index, num_experts, configs)


@without_gpu
def test_sort_ptx_drops_indices_below_zero_and_beyond_32_bits(run_ptx: Run) -> None:
    index = torch.tensor([[2**40, 1], [-1, 0], [-(2**40) + 1, 2**32 + 1], [1, 3]])
    memory = Memory()
    outputs = (poisoned(3), poisoned(8), poisoned(4, 2))
    addresses = [memory.add(out) for out in outputs]
    (config,) = choose_configs(8, 3, torch.int64)
    tensors = [argument(a, out.numel()) for a, out in zip(addresses, outputs, strict=True)]
    params = [argument(memory.add(index), 8), *tensors, int32(3), int32(2)]
    run_ptx(config, (1, 1), params, memory)
    offs, tokens, rows = (memory.get(a, out) for a, out in zip(addresses, outputs, strict=True))
    assert offs.tolist() == [1, 3, 3]
    assert tokens.tolist() == [1, 0, 3, -1, -1, -1, -1, -1]
    assert rows.tolist() == [[-1, 1], [-1, 0], [-1, -1], [2, -1]]


def permute_on_ptx(run_ptx: Run, x: Tensor, token_of_row: Tensor, config: PermuteConfig) -> None:
    """x: (T, C) uint8 whose rows may be apart; slabs of 3 rows."""
    memory, rows_per_slab, num_rows = Memory(), 3, token_of_row.numel()
    storage = x.as_strided((x.shape[0] * x.stride(0),), (1,), 0)
    out = poisoned(num_rows, x.shape[1], dtype=torch.uint8)
    source, target = memory.add(storage) + x.storage_offset(), memory.add(out)
    vectors = x.shape[1] // config.access_bytes
    params = [
        argument(memory.add(token_of_row), num_rows),
        *map(int64, (source, x.stride(0), target)),
        *map(int32, (vectors, rows_per_slab)),
    ]
    slab = min(rows_per_slab, num_rows) * vectors
    grid = (-(-slab // config.vectors_per_cta), -(-num_rows // rows_per_slab))
    run_ptx(config, grid, params, memory)
    assert_bytes_equal(memory.get(target, out), nvfp4_ops.permute(x, token_of_row))
    assert memory.writes(target, out) == [1]


@without_gpu
@pytest.mark.parametrize("config", PERMUTE_CONFIGS, ids=config_id)
@pytest.mark.parametrize("vectors", [1, 3, 130, 1100])
def test_permute_ptx_gives_the_bytes_of_the_reference(
    run_ptx: Run, config: PermuteConfig, vectors: int
) -> None:
    width = config.access_bytes
    wide = torch.randint(0, 256, (6, (vectors + 2) * width), dtype=torch.uint8)
    token_of_row = torch.tensor([5, -1, 0, 0, 3, 1, 5, -1], dtype=torch.int32)
    for x in (wide[:, : vectors * width].contiguous(), wide[:, width:-width]):
        permute_on_ptx(run_ptx, x, token_of_row, config)
    permute_on_ptx(run_ptx, wide[:1], torch.zeros(1, dtype=torch.int32), config)


def hard_rows(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes far apart, -0, Inf, NaN."""
    x = torch.randn(rows, columns) * 2.0 ** torch.randint(-8, 9, (rows, columns)).float()
    x[:, 0] = -0.0
    x[rows // 3, 1], x[rows // 2, 2], x[rows - 1, 3] = torch.inf, -torch.inf, torch.nan
    return x.to(dtype)


def assert_combined(actual: Tensor, expected: Tensor) -> None:
    """NaNs in the same places (a GPU writes others), all other bytes equal."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_bytes_equal(actual.nan_to_num(0.0), expected.nan_to_num(0.0))


def combine_on_ptx(
    run_ptx: Run, rows: Tensor, row_of_slot: Tensor, weights: Tensor, config: CombineConfig
) -> None:
    memory, tokens_per_slab = Memory(), 2
    tokens, top_k = row_of_slot.shape
    columns, vectors = rows.shape[1], rows.shape[1] // config.vector_elements
    storage = rows.as_strided((rows.shape[0] * rows.stride(0),), (1,), 0)
    source = memory.add(storage) + rows.storage_offset() * rows.itemsize
    out = poisoned(tokens, columns, dtype=rows.dtype)
    target = memory.add(out)
    params = [
        argument(source, *rows.shape, stride=rows.stride(0)),
        argument(memory.add(row_of_slot), tokens * top_k),
        argument(memory.add(weights), tokens * top_k),
        argument(target, tokens, columns, stride=columns),
        *map(int32, (top_k, tokens_per_slab)),
    ]
    slab = min(tokens_per_slab, tokens) * vectors
    grid = (-(-slab // config.threads), -(-tokens // tokens_per_slab))
    run_ptx(config, grid, params, memory)
    assert_combined(memory.get(target, out), nvfp4_ops.combine(rows, row_of_slot, weights))
    assert memory.writes(target, out) == [1]


@without_gpu
@pytest.mark.parametrize("config", COMBINE_CONFIGS, ids=config_id)
def test_combine_ptx_gives_the_bytes_of_the_reference(run_ptx: Run, config: CombineConfig) -> None:
    columns = 12 * config.vector_elements
    for tokens, top_k in ((1, 1), (5, 4), (3, 6), (2, 9)):
        rows = hard_rows(tokens * top_k, columns + 32, config.dtype)
        row_of_slot = torch.randperm(tokens * top_k).int().view(tokens, top_k)
        row_of_slot[tokens - 1, top_k // 2] = -1
        weights = torch.rand(tokens, top_k).to(config.weight_dtype)
        weights[0, -1] = 0.0
        for x in (rows[:, :columns].contiguous(), rows[:, 16 : 16 + columns]):
            combine_on_ptx(run_ptx, x, row_of_slot, weights, config)


# --- Run on a GPU -----------------------------------------------------------------------------


def sorted_on_gpu(index: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    """Outputs of a launch into poisoned memory."""
    outputs = (poisoned(num_experts), poisoned(index.numel()), poisoned(*index.shape))
    outputs = tuple(out.cuda() for out in outputs)
    nvfp4_ops.kernels.prepare_sort(index, num_experts)(index, *outputs)
    return outputs


def check_sort_on_gpu(index: Tensor, num_experts: int) -> None:
    expected = nvfp4_ops.sort_by_expert(index, num_experts)
    for _ in range(2):
        for actual, wanted in zip(sorted_on_gpu(index.cuda(), num_experts), expected, strict=True):
            assert torch.equal(actual.cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["random", "one", "others"])
@pytest.mark.parametrize("top_k", [1, 2, 6, 8, 16])
@pytest.mark.parametrize("num_experts", [1, 8, 128, 256, 1000, 1024])
def test_sort_kernel_gives_the_bytes_of_the_reference(
    num_experts: int, top_k: int, kind: str
) -> None:
    for tokens in (1, 2, 31, 33, 127, 128, 129, 1000, 8192):
        index = indices(tokens, top_k, num_experts, kind)
        for dtype in INDEX_DTYPES:
            check_sort_on_gpu(index.to(dtype), num_experts)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["random", "one", "others"])
@pytest.mark.parametrize(("top_k", "num_experts"), [(1, 8), (8, 256), (16, 1024)])
def test_sort_kernel_with_many_tokens(top_k: int, num_experts: int, kind: str) -> None:
    check_sort_on_gpu(indices(131072, top_k, num_experts, kind), num_experts)


@pytest.mark.gpu
def test_sort_op_on_cuda_without_tokens_and_with_strides() -> None:
    for index in (torch.zeros(0, 4).long(), indices(8, 40, 30).t(), indices(40, 8, 30)[::2, 1:6]):
        plan = nvfp4_ops.sort_by_expert(index.cuda(), 30)
        for actual, expected in zip(plan, nvfp4_ops.sort_by_expert(index, 30), strict=True):
            assert_bytes_equal(actual.cpu(), expected)


def random_bytes(rows: int, columns: int) -> Tensor:
    return torch.randint(0, 256, (rows, columns), dtype=torch.uint8)


# Rows of every kind that a layer permutes, and of lengths that no vector divides.
ODD_ROWS: dict[str, Callable[[], Tensor]] = {
    "hidden": lambda: torch.randn(300, 2880).bfloat16(),
    "codes": lambda: random_bytes(300, 1440),
    "block-scales": lambda: random_bytes(300, 180).view(torch.float8_e4m3fn),
    "row-scales": lambda: torch.rand(300, 1),
    "vector": lambda: torch.rand(300),
    "odd-bytes": lambda: random_bytes(300, 77),
    "odd-halves": lambda: torch.randn(300, 5).half(),
    "rank-4": lambda: torch.randn(300, 2, 3, 8),
    "columns": lambda: torch.randn(300, 512).bfloat16()[:, 16:272],
    "unaligned-columns": lambda: torch.randn(300, 512).bfloat16()[:, 3:99],
    "every-other-row": lambda: torch.randn(600, 64)[::2],
    "transposed": lambda: torch.randn(64, 300).t(),
    "one-token": lambda: torch.randn(1, 7168).bfloat16(),
    "the-same-row": lambda: torch.randn(1, 64).expand(300, 64),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ODD_ROWS)
@pytest.mark.parametrize("num_rows", [0, 1, 127, 129, 5000])
def test_permute_on_cuda_gives_the_bytes_of_the_cpu(name: str, num_rows: int) -> None:
    x = ODD_ROWS[name]()
    token_of_row = torch.randint(-1, x.shape[0], (num_rows,), dtype=torch.int32)
    # A copy to the GPU would lose strides and offset: take the storage there.
    storage = x.untyped_storage()
    on_gpu = torch.empty(0, dtype=x.dtype, device="cuda").set_(
        storage.cuda(), x.storage_offset(), x.shape, x.stride()
    )
    actual = nvfp4_ops.permute(on_gpu, token_of_row.cuda()).cpu()
    assert_bytes_equal(actual, nvfp4_ops.permute(x, token_of_row))


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_on_cuda_gives_the_bytes_of_the_cpu(
    dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    for tokens, top_k, columns in (
        *((1, 8, 7168), (2, 1, 64), (31, 2, 2880), (129, 6, 520), (33, 16, 4), (700, 5, 37)),
        (2049, 8, 1024),
    ):
        index = indices(tokens, top_k, 32)
        _, _, row_of_slot = nvfp4_ops.sort_by_expert(index, 32)
        rows = hard_rows(tokens * top_k, columns + 16, dtype)
        weights = torch.rand(tokens, top_k).to(weight_dtype)
        cuda = (rows.cuda(), row_of_slot.cuda(), weights.cuda())
        for part in (slice(0, columns), slice(8, 8 + columns), slice(1, 1 + columns)):
            expected = nvfp4_ops.combine(rows[:, part], row_of_slot, weights)
            actual = nvfp4_ops.combine(cuda[0][:, part], *cuda[1:])
            assert_combined(actual.cpu(), expected)
            assert torch.equal(
                actual.view(torch.uint8),
                nvfp4_ops.combine(cuda[0][:, part].contiguous(), *cuda[1:]).view(torch.uint8),
            )


@pytest.mark.gpu
def test_combine_on_cuda_takes_one_token_cut_out_of_a_batch() -> None:
    """Contiguous to PyTorch, with the row stride of the batch."""
    rows = torch.randn(64, 128).bfloat16().cuda()
    slots = torch.randperm(64).int().view(4, 16).cuda()
    weights = torch.rand(4, 16).cuda()
    for part in ((slice(1, 2), slice(0, 8)), (slice(None), slice(3, 4))):
        actual = nvfp4_ops.combine(rows, slots[part], weights[part])
        expected = nvfp4_ops.combine(rows.cpu(), slots[part].cpu(), weights[part].cpu())
        assert_bytes_equal(actual.cpu(), expected)


@pytest.mark.gpu
def test_combine_on_cuda_reads_no_row_of_a_dropped_slot() -> None:
    rows = torch.full((6, 64), torch.nan, device="cuda").bfloat16()
    rows[2] = 3.0
    row_of_slot = torch.tensor([[-1, 2, -1], [-1, -1, -1]], dtype=torch.int32, device="cuda")
    weights = torch.full((2, 3), torch.nan, device="cuda")
    weights[0, 1] = 0.5
    out = nvfp4_ops.combine(rows, row_of_slot, weights)
    assert (out[0] == 1.5).all()
    assert (out[1] == 0.0).all()
    empty = nvfp4_ops.combine(rows[:0], torch.full_like(row_of_slot, -1), weights)
    assert torch.equal(empty, torch.zeros_like(out))
    assert nvfp4_ops.combine(rows, row_of_slot[:0], weights[:0]).shape == (0, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 3000])
def test_routing_replays_in_a_cuda_graph_with_new_inputs(tokens: int) -> None:
    """All three in one graph, with no wait of the host; the kernels overlap at their ends."""
    num_experts, top_k = 64, 8

    def layer(x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        plan = nvfp4_ops.sort_by_expert(index, num_experts)
        rows = nvfp4_ops.permute(x, plan[1])
        return *plan, rows, nvfp4_ops.combine(rows, plan[2], weights)

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(tokens, 512).bfloat16()
        return x, indices(tokens, top_k, num_experts), torch.rand(tokens, top_k)

    static = tuple(tensor.cuda() for tensor in inputs())
    layer(*static)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = layer(*static)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(20):
        fresh = inputs()
        for target, source in zip(static, fresh, strict=True):
            target.copy_(source)
        graph.replay()
        for actual, expected in zip(outputs, layer(*fresh), strict=True):
            assert_values_equal(actual.cpu(), expected)
