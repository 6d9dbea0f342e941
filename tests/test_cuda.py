"""On a GPU: the same bytes as on the CPU where bits are defined, CUDA graphs, no host sync."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from test_moe import EXPERTS, MODES, make_inputs, make_moe

import nvfp4_ops

pytestmark = pytest.mark.gpu
BATCH_INVARIANT_MODES = (None, "per_token", "static")


@contextmanager
def no_sync() -> Iterator[None]:
    """Every wait of the host for the GPU is an error inside."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().view(torch.uint8)


def hard_values(rows: int, columns: int) -> torch.Tensor:
    """Normal rows, exact ties, zeros, -0, tiny, huge, Inf and NaN."""
    x = torch.randn(rows, columns)
    x[0] = 0.0
    x[1] = -0.0
    x[2] = torch.randint(-12, 13, (columns,)).float() / 2
    x[3] *= 1e-30
    x[4] *= 1e30
    x[5, 3], x[6, 5], x[7, 7] = torch.inf, -torch.inf, torch.nan
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("per_token", [False, True])
def test_quantize_on_cuda_gives_the_bytes_of_the_cpu(dtype: torch.dtype, per_token: bool) -> None:
    x = hard_values(300, 112).to(dtype)
    if per_token:
        scale = nvfp4_ops.global_scale(x, per_token=True)
        assert torch.equal(
            nvfp4_ops.global_scale(x.cuda(), per_token=True).cpu().nan_to_num(), scale.nan_to_num()
        )
    else:
        scale = nvfp4_ops.global_scale(x[8:])
        assert torch.equal(nvfp4_ops.global_scale(x[8:].cuda()).cpu(), scale)
    offs = torch.tensor([3, 3, 130, 280], dtype=torch.int32)
    for swizzled in (False, True):
        expected = nvfp4_ops.quantize_nvfp4(x, scale, offs, swizzled=swizzled)
        actual = nvfp4_ops.quantize_nvfp4(x.cuda(), scale.cuda(), offs.cuda(), swizzled=swizzled)
        for name, a, e in zip(("codes", "block_scale"), actual, expected, strict=True):
            assert torch.equal(bytes_of(a), bytes_of(e)), name


def test_swizzle_and_dequantize_on_cuda_give_the_bytes_of_the_cpu() -> None:
    codes = torch.randint(0, 256, (300, 56), dtype=torch.uint8)
    sf = torch.randint(0, 256, (300, 7), dtype=torch.uint8).view(torch.float8_e4m3fn)
    offs = torch.tensor([0, 129, 129, 290], dtype=torch.int32)
    swizzled = nvfp4_ops.swizzle_sf(sf.cuda(), offs.cuda())
    assert torch.equal(bytes_of(swizzled), bytes_of(nvfp4_ops.swizzle_sf(sf, offs)))
    linear = nvfp4_ops.unswizzle_sf(swizzled, (300, 7), offs.cuda())
    assert torch.equal(bytes_of(linear)[:290], bytes_of(sf)[:290])
    scale = torch.rand(300, 1)
    actual = nvfp4_ops.dequantize_nvfp4(codes.cuda(), sf.cuda(), scale.cuda()).cpu()
    expected = nvfp4_ops.dequantize_nvfp4(codes, sf, scale)
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())
    assert torch.equal(actual.isnan(), expected.isnan())


def test_quantize_weight_on_cuda_gives_the_bytes_of_the_cpu() -> None:
    w = torch.randn(4, 48, 64).bfloat16()
    for actual, expected in zip(
        nvfp4_ops.quantize_weight(w.cuda()), nvfp4_ops.quantize_weight(w), strict=True
    ):
        assert torch.equal(bytes_of(actual), bytes_of(expected))


def test_routing_on_cuda_gives_the_bytes_of_the_cpu() -> None:
    logits = torch.randn(200, EXPERTS)
    index, weights = nvfp4_ops.softmax_top_k(logits.cuda(), 2)
    assert torch.equal(index.cpu(), nvfp4_ops.softmax_top_k(logits, 2)[0])
    plan = nvfp4_ops.sort_by_expert(index, EXPERTS)
    expected = nvfp4_ops.sort_by_expert(index.cpu(), EXPERTS)
    for actual, wanted in zip(plan, expected, strict=True):
        assert torch.equal(actual.cpu(), wanted)
    _, token_of_row, row_of_slot = plan
    x = torch.randn(200, 64).bfloat16()
    rows = nvfp4_ops.permute(x.cuda(), token_of_row)
    assert torch.equal(rows.cpu(), nvfp4_ops.permute(x, token_of_row.cpu()))
    combined = nvfp4_ops.combine(rows, row_of_slot, weights)
    on_cpu = nvfp4_ops.combine(rows.cpu(), row_of_slot.cpu(), weights.cpu())
    assert torch.equal(combined.cpu(), on_cpu)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 129])
def test_moe_on_cuda_equals_cpu(mode: str | None, tokens: int) -> None:
    moe = make_moe(mode, bias=True)
    inputs = make_inputs(tokens)
    expected = moe(*inputs)
    actual = moe.cuda()(*(x.cuda() for x in inputs)).cpu()
    # fp32 sums against float64 ones: a bf16 tie now and then falls the other way.
    assert (actual != expected).sum() <= 0.05 * actual.numel()
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("mode", BATCH_INVARIANT_MODES, ids=str)
def test_moe_on_cuda_is_deterministic_and_drops_other_ranks(mode: str | None) -> None:
    moe = make_moe(mode).cuda()
    x, index, weights = (t.cuda() for t in make_inputs(64))
    index[5] = EXPERTS
    first = moe(x, index, weights)
    assert torch.equal(first, moe(x, index, weights))
    assert (first[5] == 0).all()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_moe_replays_in_a_cuda_graph_with_new_inputs(mode: str | None) -> None:
    moe = make_moe(mode, router=nvfp4_ops.SoftmaxRouter(64, EXPERTS, 2)).cuda()
    static_x = make_inputs(8)[0].cuda()
    with torch.no_grad():
        moe(static_x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with no_sync(), torch.cuda.graph(graph):
            static_out = moe(static_x)
        for seed in range(5):
            x = make_inputs(8, seed=seed)[0].cuda()
            with no_sync():
                expected = moe(x)
                static_x.copy_(x)
                graph.replay()
            assert torch.equal(static_out, expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_moe_compiled_on_cuda_equals_eager(mode: str | None) -> None:
    torch._dynamo.reset()
    moe = make_moe(mode, router=nvfp4_ops.SoftmaxRouter(64, EXPERTS, 2)).cuda()
    compiled = torch.compile(moe, fullgraph=True, dynamic=True)
    for tokens in (3, 40, 17):
        x = make_inputs(tokens)[0].cuda()
        assert torch.equal(compiled(x), moe(x))


def test_grouped_mm_on_cuda_says_when_it_is_the_reference() -> None:
    from nvfp4_ops.ops import grouped_mm

    grouped_mm._warn_of_reference.cache_clear()
    moe = make_moe().cuda()
    # No kernel takes fp16 rows.
    inputs = [x.cuda() for x in make_inputs(3, dtype=torch.float16)]
    with pytest.warns(UserWarning, match="runs the PyTorch reference, .*: "):
        moe(*inputs)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_moe_prepacks_on_hopper_and_back(mode: str | None) -> None:
    moe = make_moe(mode, bias=True)
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    moe.cuda()
    if nvfp4_ops.kernels.why_no_grouped_mm(moe.down_proj.weight.device, EXPERTS) is None:
        assert moe.down_proj.prepacked
        assert moe.down_proj.weight_scale is None
    for name, tensor in moe.state_dict().items():
        assert torch.equal(bytes_of(tensor), bytes_of(before[name])), name
    other = make_moe(mode, bias=True).cuda()
    other.load_state_dict(moe.state_dict())
    inputs = [x.cuda() for x in make_inputs(9)]
    assert torch.equal(other(*inputs), moe(*inputs))
    moe.cpu()
    assert not moe.down_proj.prepacked
    for name, tensor in moe.state_dict().items():
        assert torch.equal(bytes_of(tensor), bytes_of(before[name])), name
