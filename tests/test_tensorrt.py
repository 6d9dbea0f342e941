"""Torch-TensorRT: the checks that need no GPU, in processes of their own, and those that do.

Without a GPU torch_tensorrt is imported by answering for one, which other tests of the process must
not see; see trt_checks/. On a GPU everything is compiled and run.
"""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lowered_models import HIDDEN, MODES, blocks, linear, moe
from torch import Tensor, nn
from torch.export import Dim

from nvfp4_ops.lowering import tensorrt as lowering

CHECKS = Path(__file__).parent / "trt_checks"


def skip_without(*distributions: str) -> None:
    for name in distributions:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed; `make test` does that where torch is 2.13")


def run_checks(*files: str) -> None:
    """pytest in a process without GPUs; none of its tests may fail or be missing."""
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *(str(CHECKS / file) for file in files)],
        cwd=CHECKS.parent.parent,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-10000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, run.stdout
    if skipped := re.search(r"SKIPPED.*", run.stdout):
        pytest.skip(skipped[0])
    declared = sum((CHECKS / file).read_text().count("\ndef test_") for file in files)
    assert int(passed[1]) >= declared > 0


def test_tensorrt_partitions_and_builds_without_a_gpu() -> None:
    skip_without("torch-tensorrt-rtx")
    run_checks("check_partition.py", "check_native.py")


def test_tensorrt_plugins_without_a_gpu() -> None:
    skip_without("torch-tensorrt-rtx", "tensorrt-cu13-bindings")
    run_checks("check_plugin.py")


def test_tensorrt_example_runs() -> None:
    """As far as this machine lets it."""
    repo = CHECKS.parent.parent
    run = subprocess.run(
        [sys.executable, str(repo / "examples" / "compile_tensorrt.py")],
        env=os.environ | {"PYTHONPATH": str(repo)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    if importlib.util.find_spec("torch_tensorrt") is None:
        assert "2 NVFP4MoE and 2 NVFP4Linear are one op each for TensorRT" in run.stdout
    elif torch.cuda.is_available():
        assert re.search(r"\d engines, \d parts in PyTorch; error \d", run.stdout)
    else:
        assert run.stdout.count("1 of them NVFP4Linear, ") == 2
        assert run.stdout.count("KiB for SM120") == 3
        assert run.stdout.count("PyTorch: nvfp4_ops.router_logits") == 2


def test_trt_checks_are_all_run() -> None:
    run = set(re.findall(r"check_\w+\.py", Path(__file__).read_text()))
    assert run == {path.name for path in CHECKS.glob("check_*.py")}


# On a GPU.


@pytest.fixture
def torch_tensorrt() -> Iterator[Any]:
    module = pytest.importorskip(
        "torch_tensorrt", reason="torch-tensorrt is not installed", exc_type=ImportError
    )
    lowering.register()
    yield module
    lowering.register()


def compiled(torch_tensorrt: Any, model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    with torch.no_grad():
        return torch_tensorrt.compile(
            model, ir="dynamo", arg_inputs=[x], min_block_size=1, **options
        )


def partitions(model: nn.Module, kind: str) -> list[str]:
    return [name for name, _ in model.named_children() if name.startswith(f"_run_on_{kind}_")]


def assert_close(got: Tensor, want: Tensor) -> None:
    """Engines add attention and norms in another order than eager; bf16 has 8 bits."""
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_tensorrt_runs_a_model_with_breaks(torch_tensorrt: Any, mode: Any) -> None:
    model = blocks(mode, bias=True).cuda()
    x = torch.randn(2, 5, HIDDEN, device="cuda").bfloat16()
    engine = compiled(torch_tensorrt, model, x)
    has_fp4 = torch.cuda.get_device_capability() >= (10, 0)
    native = has_fp4 and mode in (None, "static")
    assert len(partitions(engine, "gpu")) == (2 if native else 4)
    assert_close(engine(x), model(x))


@pytest.mark.gpu
def test_tensorrt_layers_alone_have_the_bits_of_eager(torch_tensorrt: Any) -> None:
    """Nothing but layers in PyTorch and a relu in between: no order of sums to differ in."""
    lowering.register(native=False)
    first = linear("per_token").cuda()
    model = nn.Sequential(first, nn.ReLU(), linear("per_token").cuda())
    x = torch.randn(33, HIDDEN, device="cuda").bfloat16()
    engine = compiled(torch_tensorrt, model, x)
    assert len(partitions(engine, "gpu")) == 2
    torch.testing.assert_close(engine(x), model(x), rtol=0, atol=0)


@pytest.mark.gpu
def test_tensorrt_runs_every_number_of_tokens(torch_tensorrt: Any) -> None:
    model = blocks("per_token").cuda()
    x = torch.randn(1, 16, HIDDEN, device="cuda").bfloat16()
    program = torch.export.export(model, (x,), dynamic_shapes=({1: Dim("tokens", max=256)},))
    spec = torch_tensorrt.Input(
        min_shape=(1, 1, HIDDEN),
        opt_shape=(1, 16, HIDDEN),
        max_shape=(1, 256, HIDDEN),
        dtype=torch.bfloat16,
    )
    engine = torch_tensorrt.dynamo.compile(program, arg_inputs=[spec], min_block_size=1)
    for num_tokens in (1, 16, 129, 256):
        x = torch.randn(1, num_tokens, HIDDEN, device="cuda").bfloat16()
        assert_close(engine(x), model(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", [None, "static"], ids=str)
def test_tensorrt_runs_native_linears(torch_tensorrt: Any, mode: Any, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("needs a GPU with FP4: compute capability 10.0 or newer")
    layer = linear(mode, in_features=256, out_features=128, bias=True, dtype=dtype).cuda()
    x = torch.randn(130, 256, device="cuda").to(dtype)
    engine = compiled(torch_tensorrt, layer, x)
    assert not partitions(engine, "gpu")
    assert_close(engine(x), layer(x))


def register_plugins() -> None:
    try:
        lowering.register(native=False, plugin=True)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
def test_tensorrt_keeps_a_model_in_one_engine_with_plugins(torch_tensorrt: Any) -> None:
    register_plugins()
    model = blocks("per_token").cuda()
    x = torch.randn(2, 5, HIDDEN, device="cuda").bfloat16()
    engine = compiled(torch_tensorrt, model, x)
    assert len(partitions(engine, "acc")) <= 1
    assert not partitions(engine, "gpu")
    assert_close(engine(x), model(x))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_tensorrt_runs_plugins_with_the_bits_of_eager(torch_tensorrt: Any, mode: Any) -> None:
    register_plugins()

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.experts = linear(mode, bias=True), moe(mode)

        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return torch.relu(self.experts(self.linear(x), index, weights))

    model = Layers().cuda()
    x = torch.randn(33, HIDDEN, device="cuda").bfloat16()
    weights, index = torch.rand(33, 4, device="cuda").topk(2)
    with torch.no_grad():
        engine = torch_tensorrt.compile(
            model, ir="dynamo", arg_inputs=[x, index, weights], min_block_size=1
        )
    assert not partitions(engine, "gpu")
    torch.testing.assert_close(engine(x, index, weights), model(x, index, weights), rtol=0, atol=0)


@pytest.mark.gpu
def test_tensorrt_is_a_backend_of_torch_compile(torch_tensorrt: Any) -> None:
    torch.compiler.reset()
    model = blocks("per_token").cuda()
    x = torch.randn(2, 5, HIDDEN, device="cuda").bfloat16()
    with torch.no_grad():
        engine = torch.compile(
            model,
            backend="torch_tensorrt",
            options={"min_block_size": 1, "pass_through_build_failures": True},
        )
        assert_close(engine(x), model(x))
