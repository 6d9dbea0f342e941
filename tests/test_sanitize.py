"""Small runs of every GPU kernel for ``make sanitize``, and the tool that runs them.

Ragged rows, empty experts, tails, sizes that end inside a tile, each tile configuration. Inputs are
made on the CPU and results compared there, so that the GPU runs little but our kernels.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from compare import assert_bytes_equal
from test_kernels_grouped_mm import random_weights
from test_moe import make_inputs, make_moe
from torch import Tensor

import nvfp4_ops
from nvfp4_ops import kernels

on_gpu = [pytest.mark.gpu, pytest.mark.sanitize]

COUNTS: dict[str, list[int]] = {
    "one_row": [1],
    "ragged": [0, 1, 7, 0, 33],
    "tile_boundary": [127, 129, 0],
}
# Rows of an expert that lead to each tile of the grouped mm.
ROWS_PER_EXPERT = (1, 12, 24, 50, 130)
TAIL = 3


def to_gpu(value: Any) -> Any:
    return value.cuda() if isinstance(value, Tensor) else value


def assert_same_on_gpu(op: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Bytes of the GPU's results and the CPU's."""
    expected = op(*args, **options)
    actual = op(*map(to_gpu, args), **{key: to_gpu(value) for key, value in options.items()})
    if isinstance(expected, Tensor):
        expected, actual = (expected,), (actual,)
    for got, want in zip(actual, expected, strict=True):
        assert_bytes_equal(got.cpu(), want)


def end_rows(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).int()


def cases(**marked: Any) -> list[Any]:
    return [pytest.param(value, id=name, marks=on_gpu) for name, value in marked.items()]


@pytest.mark.parametrize("counts", cases(**COUNTS))
@pytest.mark.parametrize("swizzled", [False, True], ids=["linear", "swizzled"])
def test_sanitize_quantize(counts: list[int], swizzled: bool) -> None:
    x, offs = torch.randn(sum(counts) + TAIL, 48).bfloat16(), end_rows(counts)
    scale = torch.rand(len(counts)) * 1e-2 + 1e-3
    assert_same_on_gpu(nvfp4_ops.quantize_nvfp4, x, scale, offs, swizzled=swizzled)
    assert_same_on_gpu(nvfp4_ops.quantize_nvfp4, x.half(), scale[0], swizzled=swizzled)
    per_row = nvfp4_ops.global_scale(x, per_token=True)
    assert_same_on_gpu(nvfp4_ops.quantize_nvfp4, x.float(), per_row, swizzled=swizzled)


@pytest.mark.parametrize("counts", cases(**COUNTS))
@pytest.mark.parametrize("k", [48, 2080])
def test_sanitize_round(counts: list[int], k: int) -> None:
    num_rows, offs = sum(counts) + TAIL, end_rows(counts)
    scale = torch.rand(len(counts)) * 1e-2 + 1e-3
    x, tokens = torch.randn(7, k), torch.randint(-1, 7, (num_rows,)).int()
    rows = torch.randn(num_rows, k)
    for dtype in (torch.bfloat16, torch.float32):
        assert_same_on_gpu(nvfp4_ops.round_nvfp4, rows.to(dtype), scale, offs)
        assert_same_on_gpu(nvfp4_ops.round_nvfp4, x.to(dtype), scale[0], token_of_row=tokens)
        assert_same_on_gpu(nvfp4_ops.round_per_token_nvfp4, rows.to(dtype), offs)
        assert_same_on_gpu(nvfp4_ops.round_per_token_nvfp4, x.to(dtype), token_of_row=tokens)


@pytest.mark.parametrize("counts", cases(**COUNTS))
@pytest.mark.parametrize("columns", [3, 20, 32])
def test_sanitize_swizzle(counts: list[int], columns: int) -> None:
    rows, offs = sum(counts) + TAIL, end_rows(counts)
    sf = torch.randint(1, 127, (rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)
    for ragged in (None, offs):
        assert_same_on_gpu(nvfp4_ops.swizzle_sf, sf, ragged)
        swizzled = nvfp4_ops.swizzle_sf(sf, ragged)
        assert_same_on_gpu(nvfp4_ops.unswizzle_sf, swizzled, (rows, columns), ragged)


@pytest.mark.parametrize("gated", cases(plain=False, gated=True))
@pytest.mark.parametrize(("n", "k"), [(32, 16), (160, 112), (64, 1152)])
def test_sanitize_prepack(gated: bool, n: int, k: int) -> None:
    codes, sf = random_weights(3, n, k)
    assert_same_on_gpu(nvfp4_ops.prepack_weight, codes, sf, gated=gated)
    assert_same_on_gpu(kernels.unpack, nvfp4_ops.prepack_weight(codes, sf, gated=gated), n, k)


def assert_close_on_gpu(x: Tensor, codes: Tensor, sf: Tensor, gated: bool, **options: Any) -> None:
    n = codes.shape[1]
    offs = options.pop("offs")
    expected = nvfp4_ops.grouped_scaled_mm(x, codes, None, sf, offs=offs, **options).float()
    packed = nvfp4_ops.prepack_weight(codes, sf, gated=gated).cuda()
    moved = {key: to_gpu(value) for key, value in options.items()}
    actual = nvfp4_ops.grouped_scaled_mm(
        x.cuda(), packed, None, None, offs=offs.cuda(), num_columns=n, **moved
    )
    # Twice a rounding to bf16.
    bound = 2**-7 * (expected.abs() + expected.abs().mean())
    assert ((actual.cpu().float() - expected).abs() <= bound).all()


@pytest.mark.parametrize(
    "counts",
    cases(**COUNTS, **{f"rows_{rows}": [rows, 0, rows] for rows in ROWS_PER_EXPERT}),
)
@pytest.mark.parametrize("epilogue", ["plain", "full", "gated"])
def test_sanitize_grouped_mm(counts: list[int], epilogue: str) -> None:
    num_experts, rows, n = len(counts), sum(counts) + TAIL, 96
    codes, sf = random_weights(num_experts, n, 144)
    options: dict[str, Any] = {"alpha": torch.rand(num_experts, 2) * 1e-3 + 1e-4}
    if epilogue != "plain":
        options["bias"] = torch.randn(num_experts, n)
        options["row_scale"] = torch.rand(rows) + 0.5
    if epilogue == "full":
        options["out_dtype"] = torch.float32
    if epilogue == "gated":
        options["activation"] = "silu_mul"
    x = torch.randn(rows, 144).bfloat16()
    gated = epilogue == "gated"
    assert_close_on_gpu(x, codes, sf, gated, offs=end_rows(counts), **options)


@pytest.mark.parametrize("tokens", cases(one=1, few=37, several_ctas=2100))
def test_sanitize_routing(tokens: int) -> None:
    num_experts = 5
    # An index of 5 is another rank's expert.
    index = torch.randint(0, num_experts + 1, (tokens, 2))
    assert_same_on_gpu(nvfp4_ops.sort_by_expert, index, num_experts)
    _, token_of_row, row_of_slot = nvfp4_ops.sort_by_expert(index, num_experts)
    for columns in (7, 24):
        x = torch.randn(tokens, columns).bfloat16()
        assert_same_on_gpu(nvfp4_ops.permute, x, token_of_row)
        rows = nvfp4_ops.permute(x, token_of_row)
        assert_same_on_gpu(nvfp4_ops.combine, rows, row_of_slot, torch.rand(tokens, 2))


@pytest.mark.parametrize("tokens", cases(one=1, some=11))
def test_sanitize_router(tokens: int) -> None:
    x, weight = torch.randn(tokens, 1048).bfloat16(), torch.randn(60, 1048).bfloat16()
    assert_same_on_gpu(nvfp4_ops.router_logits, x, weight)
    logits, bias = nvfp4_ops.router_logits(x, weight), torch.randn(60)
    for chosen, expected in (
        (nvfp4_ops.softmax_top_k(logits.cuda(), 8), nvfp4_ops.softmax_top_k(logits, 8)),
        (
            nvfp4_ops.sigmoid_top_k(logits.cuda(), bias.cuda(), 8, num_groups=4, top_groups=2),
            nvfp4_ops.sigmoid_top_k(logits, bias, 8, num_groups=4, top_groups=2),
        ),
    ):
        assert_bytes_equal(chosen[0].cpu(), expected[0])
        torch.testing.assert_close(chosen[1].cpu(), expected[1], rtol=2**-23, atol=0)


@pytest.mark.parametrize("mode", cases(weight_only=None, per_token="per_token", static="static"))
def test_sanitize_layer(mode: str | None) -> None:
    moe, inputs = make_moe(mode, bias=True), make_inputs(11)
    expected = moe(*inputs).float()
    actual = moe.cuda()(*(x.cuda() for x in inputs)).cpu().float()
    assert (actual - expected).norm() <= 0.05 * expected.norm()


# --- The tool, without a GPU ------------------------------------------------------------------


@pytest.fixture
def tool() -> ModuleType:
    path = Path(__file__).parent.parent / "tools" / "sanitize.py"
    spec = importlib.util.spec_from_file_location("sanitize", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_sanitizer(directory: Path, exit_status: int) -> Path:
    path = directory / "compute-sanitizer"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@"\nexit {exit_status}\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("place", ["path", "toolkit", "package"])
def test_sanitize_finds_the_sanitizer(
    place: str, tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setattr(tool.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    directories = {"path": "path", "toolkit": "toolkit/bin", "package": "nvidia/cu13/bin"}
    path = fake_sanitizer(tmp_path / directories[place], 0)
    assert tool.find_sanitizer() == path


@pytest.mark.parametrize("missing", ["sanitizer", "device"])
def test_sanitize_says_what_is_missing(
    missing: str,
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = None if missing == "sanitizer" else tmp_path
    monkeypatch.setattr(tool, "find_sanitizer", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tool.main([]) == 2
    reason = "is not on PATH" if missing == "sanitizer" else "there is no CUDA GPU"
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize(
    ("exit_status", "verdict"),
    [(0, "no errors"), (86, "found errors"), (5, "no test ran"), (1, "tests failed")],
)
def test_sanitize_fails_on_any_error(
    exit_status: int,
    verdict: str,
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = fake_sanitizer(tmp_path, exit_status)
    monkeypatch.setattr(tool, "find_sanitizer", lambda: path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert tool.main(["racecheck", "--", "-k", "quantize"]) == (exit_status != 0)
    printed = capfd.readouterr().out
    assert "1 --tool racecheck --error-exitcode 86" in printed
    assert "-m pytest -m sanitize" in printed
    assert "-k quantize" in printed
    assert f"sanitize: racecheck: {verdict}" in printed
    assert "memcheck" not in printed


def test_sanitize_rejects_other_tools(tool: ModuleType) -> None:
    assert tool.main(["leakcheck"]) == 2
