"""torch.export and AOTInductor: programs and packages of models with NVFP4MoE, saved and run again.

A saved program has the bits of eager mode. A package has those of ``torch.compile``: the ops' own
in every mode, and Inductor's arithmetic in what lies between them.
"""

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from compare import assert_bytes_equal
from test_moe import EXPERTS, HIDDEN, MODES, TOP_K, make_inputs, make_moe
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.cpp_extension import CUDA_HOME

import nvfp4_ops
from bench import export as export_bench
from bench.moe_layers import Shape, random_routing
from nvfp4_ops import kernels

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "examples"))

import export as export_example  # noqa: E402
from tiny_moe.config import TinyMoeConfig  # noqa: E402
from tiny_moe.model import TinyMoe  # noqa: E402

EXAMPLE_TOKENS, TOKENS = 5, (0, 1, 2, 5, 300)
CONFIG = TinyMoeConfig(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=len(MODES),
    num_attention_heads=2,
    num_key_value_heads=1,
    num_experts=EXPERTS,
    moe_intermediate_size=48,
)
each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module"
)

# What a user of a package runs; prints nothing if all is well.
RUN_PACKAGE = """
import sys, torch
import nvfp4_ops
package, inputs, outputs = sys.argv[1:]
run = torch._inductor.aoti_load_package(package)
torch.save([run(x) for x in torch.load(inputs)], outputs)
"""
WITHOUT_IMPORT = """
import sys, torch
for load, path in zip((torch.export.load, torch._inductor.aoti_load_package), sys.argv[1:]):
    try:
        load(path)
    except RuntimeError as error:
        print(error)
    else:
        print("loaded")
"""


class Stack(nn.Module):
    """An NVFP4MoE of every mode, each with a router, biases in one; sums alone between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            make_moe(
                mode,
                bias=mode == "static",
                router=nvfp4_ops.SoftmaxRouter(HIDDEN, EXPERTS, TOP_K),
            )
            for mode in MODES
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@torch.no_grad()
def make_decoder(
    device: str, modes: tuple[str | None, ...] = MODES, dtype: torch.dtype = torch.bfloat16
) -> TinyMoe:
    """A decoder with attention, its layers' experts in one mode each."""
    model = TinyMoe(CONFIG).to(dtype).eval()
    model.model.layers = model.model.layers[: len(modes)]
    nn.init.normal_(model.model.embed_tokens.weight, std=0.02)
    for layer in model.model.layers:
        layer.mlp.experts = make_moe()
    with nvfp4_ops.calibrate(model):
        model(torch.arange(64).view(1, -1))
    for layer, mode in zip(model.model.layers, modes, strict=True):
        layer.mlp.experts.activation_scale = mode
    return model.to(device)


def make_tokens(count: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(CONFIG.vocab_size, (1, count), generator=generator).to(device)


def make_rows(count: int, device: str) -> Tensor:
    return make_inputs(count, seed=count)[0].to(device)


def export(module: nn.Module, x: Tensor, dim: int) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, (x,), dynamic_shapes=({dim: Dim.DYNAMIC},))


@each_device
@torch.no_grad()
def test_export_of_a_decoder_is_saved_and_loaded_with_the_bits_of_eager(device: str) -> None:
    model = make_decoder(device)
    buffer = io.BytesIO()
    torch.export.save(export(model, make_tokens(EXAMPLE_TOKENS, device), 1), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for count in TOKENS[1:]:  # not every device's attention takes no token
        ids = make_tokens(count, device)
        assert torch.equal(loaded.module()(ids), model(ids)), count
    # As they are on this device: prepacked on a GPU that gains by it.
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    weights = [name for name in own if name.endswith("experts.down_proj.weight")]
    assert loaded.state_dict.keys() >= {*weights}
    for name, tensor in loaded.state_dict.items():
        assert_bytes_equal(tensor, own[name], name)


@torch.no_grad()
def test_exported_program_refuses_another_layout_of_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moe = make_moe()
    codes, scale = moe.down_proj.weight, moe.down_proj.weight_scale

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("packed", nvfp4_ops.prepack_weight(codes, scale))

        def forward(self, x: Tensor, offs: Tensor) -> Tensor:
            alpha = torch.ones(EXPERTS)
            return nvfp4_ops.grouped_scaled_mm(
                x, self.packed, None, None, alpha, offs, num_columns=codes.shape[1]
            )

    inputs = torch.ones(EXPERTS, 2 * codes.shape[2]), torch.arange(1, EXPERTS + 1).int()
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Product(), inputs), buffer)
    buffer.seek(0)
    run = torch.export.load(buffer).module()
    expected = nvfp4_ops.grouped_scaled_mm(
        inputs[0], codes, None, scale, torch.ones(EXPERTS), inputs[1]
    )
    assert torch.equal(run(*inputs), expected)
    monkeypatch.setattr(kernels, "LAYOUT", kernels.LAYOUT + 1)
    with pytest.raises(ValueError, match=r"layout 2, but .* has layout 3: export the program anew"):
        run(*inputs)


@pytest.mark.parametrize("count", [0, 1])
def test_export_from_an_example_of_none_or_one_token_says_that_it_would_be_fixed(
    count: int,
) -> None:
    with pytest.raises(Exception, match="specialized"):
        export(Stack(), make_rows(count, "cpu"), 0)


def test_export_takes_a_whole_number_for_the_activation_limit() -> None:
    """The op's schema has a float there, and a package is strict about it."""
    assert isinstance(nvfp4_ops.Activation("silu_mul", 7).limit, float)


def compile_package(program: torch.export.ExportedProgram, path: Path) -> Path:
    if any(tensor.is_cuda for tensor in program.state_dict.values()) and CUDA_HOME is None:
        pytest.skip("AOTInductor for CUDA needs the CUDA toolkit's headers")
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return path


def run_in_new_process(package: Path, inputs: list[Tensor]) -> list[Tensor]:
    files = package.with_suffix(".inputs"), package.with_suffix(".outputs")
    torch.save(inputs, files[0])
    subprocess.run(
        [sys.executable, "-c", RUN_PACKAGE, package, *files], cwd=REPO, check=True, timeout=300
    )
    outputs: list[Tensor] = torch.load(files[1])
    return outputs


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packages")


class Packaged(NamedTuple):
    """A module, and the files it was exported and packaged into."""

    module: nn.Module
    program: Path
    package: Path
    device: str


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def stack(request: pytest.FixtureRequest, directory: Path) -> Packaged:
    device: str = request.param
    module = Stack().to(device)
    program = export(module, make_rows(EXAMPLE_TOKENS, device), 0)
    saved = directory / f"stack_{device}_program.pt2"
    torch.export.save(program, saved)
    package = compile_package(program, directory / f"stack_{device}.pt2")
    return Packaged(module, saved, package, device)


@torch.no_grad()
def test_package_of_every_mode_has_the_bits_of_eager_in_a_new_process(stack: Packaged) -> None:
    inputs = [make_rows(count, stack.device) for count in TOKENS]
    outputs = run_in_new_process(stack.package, inputs)
    loaded = torch.export.load(stack.program).module()
    for x, y in zip(inputs, outputs, strict=True):
        assert torch.equal(y, stack.module(x)), x.shape[0]
        assert torch.equal(y, loaded(x)), x.shape[0]


def test_files_need_the_import_of_nvfp4_ops(stack: Packaged) -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_IMPORT, stack.program, stack.package],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "loaded" not in run.stdout.splitlines()
    assert "Could not find schema for nvfp4_ops::" in run.stdout
    # torch.export.load says why in its log alone.
    assert "nvfp4_ops" in run.stderr


@torch.no_grad()
def test_package_of_a_decoder_has_the_bits_of_torch_compile(directory: Path) -> None:
    model = make_decoder("cpu", ("per_token",), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    program = export(model, make_tokens(EXAMPLE_TOKENS, "cpu"), 1)
    package = compile_package(program, directory / "decoder.pt2")
    inputs = [make_tokens(count, "cpu") for count in TOKENS if count >= 2]
    for ids, logits in zip(inputs, run_in_new_process(package, inputs), strict=True):
        assert torch.equal(logits, compiled(ids))
        error = (logits - model(ids)).float().norm() / model(ids).float().norm()
        # A sum in another order can take a value over a tie: a step of e2m1 then.
        assert error < 2**-8


def test_export_example_makes_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(export_example, "export", lambda path: seen.append((path, path.is_dir())))
    export_example.main(tmp_path / "new" / "one")
    assert seen == [(tmp_path / "new" / "one", True)]


def test_export_example_runs_a_package_in_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = export_example.load_quantized

    def load_one_layer(*arguments: Any, **options: Any) -> TinyMoe:
        model = load(*arguments, **options)
        model.model.layers = model.model.layers[:1]
        return model

    monkeypatch.setattr(export_example, "load_quantized", load_one_layer)
    export_example.main(tmp_path)
    printed = capsys.readouterr().out
    assert "program.pt2: the bits of eager mode" in printed
    followers = re.findall(r"  (.+) follows .* in a new process, (.+) in this one", printed)
    assert len(followers) == 2
    assert all(there == here for there, here in followers)
    assert {"program.pt2", "package.pt2"} <= {file.name for file in tmp_path.iterdir()}


@torch.no_grad()
def test_export_bench_refuses_other_bits_than_those_of_eager(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export_bench, "BATCHES", 1)
    monkeypatch.setattr(export_bench, "CALLS_PER_BATCH", 2)
    shape = Shape("tiny", 32, 16, 4, 2)
    block = export_bench.Block(shape, "cpu")
    x = random_routing(shape, 3, 1, "cpu").x
    ways = export_bench.make_ways(block, x, None)
    result = export_bench.run_case(block, ways, x)
    assert (result.mode, result.tokens, result.package_us) == ("weight-only", 3, None)
    assert min(result.eager_us, result.compiled_us, result.exported_us) > 0
    with pytest.raises(AssertionError, match="wrong: another result than eager mode for 3 tokens"):
        export_bench.run_case(block, {"wrong": lambda x: block(x) + 1}, x)
