"""The kernels of routers: their PTX run on the CPU, compared with the reference on a GPU."""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_bytes_equal
from torch import Tensor

import nvfp4_ops
from nvfp4_ops import format as nvfp4
from nvfp4_ops import kernels, router_logits, sigmoid_top_k, softmax_top_k

if not torch.cuda.is_available():
    os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")
pytest.importorskip("cutlass")
pytest.importorskip("tvm_ffi")

from kernel_checks import INF, NAN, assert_follows_previous_kernel, config_id, frames_and_registers
from ptx_machine import Kernel, Memory

from nvfp4_ops.kernels import choose_experts
from nvfp4_ops.kernels import router_logits as logits_kernel
from nvfp4_ops.kernels.launch.choose_experts import (
    BIAS_DTYPES,
    WARPS,
    ChooseConfig,
    choose_experts_per_lane,
    prepare_choose,
)
from nvfp4_ops.kernels.launch.router_logits import (
    MAX_TOKENS,
    RouterLogitsConfig,
    prepare_router_logits,
)

without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the GPU tests compile and run them"
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

CHOOSE_CONFIGS = [
    *(
        ChooseConfig("softmax", dtype, None, per_lane, False, renormalize)
        for dtype, per_lane in zip(DTYPES, (1, 8, 32), strict=True)
        for renormalize in (False, True)
    ),
    *(
        ChooseConfig("sigmoid", torch.float32, bias, per_lane, grouped, True)
        for bias, per_lane in zip((None, *BIAS_DTYPES), (1, 32, 8), strict=True)
        for grouped in (False, True)
    ),
]
LOGITS_CONFIGS = [
    RouterLogitsConfig(dtype, weight_dtype, tokens)
    for dtype in DTYPES
    for weight_dtype in DTYPES
    for tokens in (1, 8)
]


def build(config: Any, options: str = "") -> Any:
    module = choose_experts if isinstance(config, ChooseConfig) else logits_kernel
    arch = "" if torch.cuda.is_available() else "--gpu-arch sm_90a "
    return module.build(config, arch + options)


def hard_logits(num_tokens: int, num_experts: int) -> Tensor:
    """Ties, both zeros, huge ones, Inf, NaN, and experts that are masked."""
    logits = torch.randn(max(num_tokens, 10), num_experts)
    logits[0] = 0.0
    logits[1, ::2] = -0.0
    logits[1, 1::2] = 0.0
    logits[2] = logits[2].round()
    logits[3] *= 1e30
    logits[4, num_experts // 2] = INF
    logits[5, 0] = logits[5, -1] = NAN
    logits[9, num_experts // 3] = torch.tensor(NAN).copysign(torch.tensor(-1.0))
    logits[6] = -INF
    logits[7, ::3] = -INF
    logits[8] *= 100
    return logits[:num_tokens]


# --- Compiled without a GPU -------------------------------------------------------------------


@without_gpu
@pytest.mark.parametrize("config", [*CHOOSE_CONFIGS, *LOGITS_CONFIGS], ids=config_id)
def test_router_kernels_compile_to_exact_arithmetic_in_registers(
    config: Any, tmp_path: Path
) -> None:
    compiled = build(config, f"--keep-ptx --keep-cubin --dump-dir {tmp_path}")
    frames, _ = frames_and_registers(tmp_path)
    assert frames
    assert not any(frames)
    assert_follows_previous_kernel(compiled.__ptx__)
    for inexact in (".local", ".ftz", ".approx", "fma.rn.f32", "ex2"):
        assert inexact not in compiled.__ptx__


def add_matrix(memory: Memory, tensor: Tensor) -> tuple[int, bytes]:
    """Address of a copy, and the kernel's parameter for it."""
    address = memory.add(tensor)
    return address, struct.pack("<q2iq", address, *tensor.shape, tensor.shape[1])


def choose_on_cpu(
    kernel: Kernel,
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    groups: tuple[int, int],
    scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    index, weights = torch.full((num_tokens, top_k), -7), torch.full((num_tokens, top_k), -7.0)
    memory = Memory()
    _, given = add_matrix(memory, logits)
    index_at, index_param = add_matrix(memory, index)
    weights_at, weights_param = add_matrix(memory, weights)
    biases = [] if bias is None else [struct.pack("<qi4x", memory.add(bias), num_experts)]
    numbers = [struct.pack("<i", count) for count in groups] + [struct.pack("<d", scaling_factor)]
    params = [given, *biases, index_param, weights_param, *numbers]
    kernel.launch((nvfp4.ceil_div(num_tokens, WARPS), 1), params, memory)
    assert memory.writes(index_at, index) == memory.writes(weights_at, weights) == [1]
    return memory.get(index_at, index), memory.get(weights_at, weights)


@without_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "top_k"), [(1, 1), (8, 2), (32, 32), (100, 8), (256, 6)], ids=str
)
def test_softmax_ptx_chooses_like_the_reference(
    num_experts: int, top_k: int, renormalize: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    per_lane = choose_experts_per_lane(num_experts)
    config = ChooseConfig("softmax", dtype, None, per_lane, False, renormalize)
    kernel = Kernel(build(config, f"--keep-ptx --dump-dir {tmp_path}").__ptx__)
    logits = hard_logits(10, num_experts).to(dtype)
    index, weights = choose_on_cpu(kernel, logits, None, top_k, (1, 1), 1.0)
    check_choice((index, weights), softmax_top_k(logits, top_k, renormalize=renormalize))


@without_gpu
@pytest.mark.parametrize("bias_dtype", [None, *BIAS_DTYPES], ids=str)
@pytest.mark.parametrize(
    ("num_experts", "top_k", "groups", "scaling_factor"),
    [(8, 2, (1, 1), 1.0), (16, 4, (4, 2), 1.0), (256, 8, (8, 4), 2.446), (60, 6, (20, 3), 0.5)],
    ids=str,
)
def test_sigmoid_ptx_chooses_like_the_reference(
    num_experts: int,
    top_k: int,
    groups: tuple[int, int],
    scaling_factor: float,
    bias_dtype: torch.dtype | None,
    tmp_path: Path,
) -> None:
    per_lane = choose_experts_per_lane(num_experts)
    config = ChooseConfig("sigmoid", torch.float32, bias_dtype, per_lane, groups[0] > 1, True)
    kernel = Kernel(build(config, f"--keep-ptx --dump-dir {tmp_path}").__ptx__)
    logits = hard_logits(10, num_experts)
    bias = None if bias_dtype is None else torch.randn(num_experts).to(bias_dtype)
    chosen = choose_on_cpu(kernel, logits, bias, top_k, groups, scaling_factor)
    options = {"num_groups": groups[0], "top_groups": groups[1], "scaling_factor": scaling_factor}
    check_choice(chosen, sigmoid_top_k(logits, bias, top_k, **options))


def check_choice(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """The same experts; weights that differ by the last bit at most, as exp in fp64 may."""
    assert_bytes_equal(actual[0].cpu(), expected[0])
    torch.testing.assert_close(
        actual[1].cpu(), expected[1], rtol=2**-23, atol=2**-149, equal_nan=True
    )
    assert ((actual[1].cpu() != expected[1]) & ~expected[1].isnan()).float().mean() < 1e-3


@without_gpu
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "tokens", "hidden"), [(1, 1, 1048), (2, 2, 8), (3, 4, 2048), (11, 8, 520)]
)
def test_router_logits_ptx_sums_like_the_reference(
    num_tokens: int,
    tokens: int,
    hidden: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    config = RouterLogitsConfig(dtype, weight_dtype, tokens)
    kernel = Kernel(build(config, f"--keep-ptx --dump-dir {tmp_path}").__ptx__)
    x, weight = torch.randn(num_tokens, hidden).to(dtype), torch.randn(3, hidden).to(weight_dtype)
    out, memory = torch.full((num_tokens, 3), NAN), Memory()
    (_, x_param), (_, weight_param), (out_at, out_param) = (
        add_matrix(memory, tensor) for tensor in (x, weight, out)
    )
    params = [x_param, weight_param, out_param]
    kernel.launch((3, nvfp4.ceil_div(num_tokens, tokens)), params, memory)
    assert_bytes_equal(memory.get(out_at, out), router_logits(x, weight))
    assert memory.writes(out_at, out) == [1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChooseConfig("max", DTYPES[0], None, 1, False, True), "rule: must be"),
        (lambda: ChooseConfig("softmax", torch.int32, None, 1, False, True), "dtype: must be"),
        (lambda: ChooseConfig("sigmoid", DTYPES[0], DTYPES[1], 1, False, True), "bias: must be"),
        (lambda: ChooseConfig("softmax", DTYPES[0], None, 1, True, True), "only sigmoid has"),
        (lambda: ChooseConfig("softmax", DTYPES[0], None, 3, False, True), "experts_per_lane"),
        (lambda: RouterLogitsConfig(torch.int8, DTYPES[0], 1), "dtype: must be"),
        (lambda: RouterLogitsConfig(DTYPES[0], DTYPES[0], 9), "tokens: must be 1 to 8, got 9"),
        (
            lambda: prepare_router_logits(torch.ones(129, 8), torch.ones(2, 8), build),
            "x: the kernel is not for 129 tokens and a weight of 16",
        ),
        (
            lambda: prepare_router_logits(torch.ones(65, 4096), torch.ones(256, 4096), build),
            "x: the kernel is not for 65 tokens and a weight of 1048576",
        ),
        (
            lambda: prepare_router_logits(torch.ones(2, 9), torch.ones(2, 9), build),
            "x: the kernel takes H in multiples of 8, got 9",
        ),
        (
            lambda: prepare_choose("softmax", torch.ones(2, 1025), None, 2, build),
            "at most 1024 experts, got 1025",
        ),
        (
            lambda: prepare_choose("softmax", torch.ones(2, 64), None, 33, build),
            "at most 32 experts of a token, got 33",
        ),
        (
            lambda: prepare_choose("sigmoid", torch.ones(2, 99), None, 2, build, num_groups=33),
            "at most 32 groups, got 33",
        ),
    ],
)
def test_router_kernels_reject(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- Run on a GPU -----------------------------------------------------------------------------


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "top_k"),
    [(1, 1), (8, 2), (33, 32), (128, 8), (256, 9), (1000, 7), (1024, 10), (1500, 4), (64, 40)],
    ids=str,
)
def test_softmax_kernel_chooses_like_the_reference(
    num_experts: int, top_k: int, renormalize: bool, dtype: torch.dtype
) -> None:
    for num_tokens in (1, 7, 129):
        logits = hard_logits(num_tokens, num_experts).to(dtype)
        expected = softmax_top_k(logits, top_k, renormalize=renormalize)
        check_choice(softmax_top_k(logits.cuda(), top_k, renormalize=renormalize), expected)
        strided = torch.stack([logits, logits], dim=2).cuda()[:, :, 1]
        check_choice(softmax_top_k(strided, top_k, renormalize=renormalize), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("bias_dtype", [None, *BIAS_DTYPES], ids=str)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "groups", "scaling_factor"),
    [
        (8, 2, (1, 1), 1),
        (16, 4, (4, 2), 1.0),
        (256, 8, (8, 4), 2.446),
        (384, 6, (1, 1), 2.5),
        (512, 22, (32, 9), 0.3),
        (660, 3, (33, 5), 1.0),
    ],
    ids=str,
)
def test_sigmoid_kernel_chooses_like_the_reference(
    num_experts: int,
    top_k: int,
    groups: tuple[int, int],
    scaling_factor: float,
    renormalize: bool,
    bias_dtype: torch.dtype | None,
) -> None:
    bias = None if bias_dtype is None else torch.randn(num_experts).to(bias_dtype)
    options = {
        "num_groups": groups[0],
        "top_groups": groups[1],
        "scaling_factor": scaling_factor,
        "renormalize": renormalize,
    }
    for num_tokens in (1, 7, 129):
        logits = hard_logits(num_tokens, num_experts)
        on_gpu = sigmoid_top_k(
            logits.cuda(), None if bias is None else bias.cuda(), top_k, **options
        )
        check_choice(on_gpu, sigmoid_top_k(logits, bias, top_k, **options))


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [8, 520, 2048, 7168, 100])
def test_router_logits_kernel_sums_like_the_reference(
    hidden: int, weight_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    weight = torch.randn(70, hidden).to(weight_dtype)
    for num_tokens in (1, 2, 3, 7, 8, 33, MAX_TOKENS, MAX_TOKENS + 1):
        x = torch.randn(num_tokens, hidden).to(dtype)
        expected = router_logits(x, weight)
        assert_bytes_equal(router_logits(x.cuda(), weight.cuda()).cpu(), expected)
        strided = torch.stack([x, x], dim=2).cuda()[:, :, 1]
        assert_bytes_equal(router_logits(strided, weight.cuda()).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "router",
    [
        nvfp4_ops.SoftmaxRouter(256, 32, 4),
        nvfp4_ops.SigmoidRouter(256, 32, 4, num_groups=4, top_groups=2),
    ],
    ids=["softmax", "sigmoid"],
)
@torch.no_grad()
def test_router_replays_in_a_cuda_graph_as_it_runs(router: torch.nn.Module) -> None:
    router = router.cuda()
    static = torch.randn(5, 256, device="cuda").bfloat16()
    assert kernels.why_no_router_logits(static, router.weight) is None
    router(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = router(static)
    for _ in range(3):
        static.copy_(torch.randn(5, 256).bfloat16())
        graph.replay()
        for actual, expected in zip(outputs, router(static.clone()), strict=True):
            assert_bytes_equal(actual.cpu(), expected.cpu())
