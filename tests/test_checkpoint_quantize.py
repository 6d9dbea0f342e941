"""quantize_checkpoint: ModelOpt's bytes, resumed after an interruption, refused by name."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import PREFIX, Tensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nvfp4_ops import (
    CheckpointError,
    NVFP4MoE,
    calibrate,
    dequantize_nvfp4,
    inspect_checkpoint,
    open_checkpoint,
    quantize_checkpoint,
    quantize_weight,
)
from nvfp4_ops.__main__ import main
from nvfp4_ops.checkpoint import input_amax, load_experts, quantize

MIXTRAL_PREFIX = "model.layers.0.block_sparse_moe.experts"


def same_bytes(a: Tensor, b: Tensor) -> bool:
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def write_source(directory: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config or {"model_type": "qwen3_moe"}))
    return directory


def float_tensors(num_experts: int = 4) -> Tensors:
    """A model of one layer: experts, attention, router, norm."""
    layer = PREFIX.removesuffix(".mlp.experts")
    sizes = {
        "lm_head.weight": (16, 48),
        f"{layer}.mlp.gate.weight": (num_experts, 48),
        f"{layer}.self_attn.q_proj.weight": (32, 48),
        f"{layer}.self_attn.k_proj.weight": (16, 48),
        f"{layer}.input_layernorm.weight": (48,),
    }
    for expert in range(num_experts):
        for name, size in (("gate_proj", (32, 48)), ("up_proj", (32, 48)), ("down_proj", (48, 32))):
            sizes[f"{PREFIX}.{expert}.{name}.weight"] = size
    return {name: torch.randn(size).bfloat16() for name, size in sizes.items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = write_source(tmp_path / "source", float_tensors())
    (directory / "tokenizer.json").write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(b"not to be copied")
    return directory


@pytest.mark.parametrize("sharded", [False, True], ids=["one_file", "shards"])
@pytest.mark.parametrize(
    ("base", "exported"),
    [
        ("base_qwen3_moe", "models/modelopt_qwen3_moe_experts_only"),
        ("base_mixtral", "models/modelopt_mixtral"),
    ],
)
def test_quantize_checkpoint_reproduces_modelopt(
    data: Path, tmp_path: Path, base: str, exported: str, sharded: bool
) -> None:
    source = load_file(data / base / "model.safetensors")
    modules = tuple(name.removesuffix("weight") for name in source)
    expected = {
        name: tensor
        for name, tensor in load_file(data / exported / "model.safetensors").items()
        if name.startswith(modules) and not name.endswith("input_scale")
    }
    size = sum(tensor.nbytes for tensor in expected.values())
    max_shard_bytes = size // 4 if sharded else 1 << 30
    quantize_checkpoint(data / base, tmp_path / "q", max_shard_bytes=max_shard_bytes)
    sizes = [path.stat().st_size for path in (tmp_path / "q").glob("*.safetensors")]
    assert (len(sizes) > 3) == sharded
    assert max(sizes) < max_shard_bytes + 16000, "shards but for their headers"
    checkpoint = open_checkpoint(tmp_path / "q")
    assert sorted(expected) == checkpoint.names()
    for name in expected:
        assert same_bytes(checkpoint.tensor(name), expected[name]), name


def test_quantize_checkpoint_writes_a_whole_checkpoint(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "q")
    files = {path.name for path in (tmp_path / "q").iterdir()}
    assert files == {
        "model.safetensors",
        "config.json",
        "hf_quant_config.json",
        "tokenizer.json",
    }
    modes = {path.stat().st_mode for path in (tmp_path / "q").iterdir()}
    assert len(modes) == 1, "the weights are as readable as the rest"
    checkpoint = open_checkpoint(tmp_path / "q")
    floats = load_file(source / "model.safetensors")
    kept = {name: t for name, t in floats.items() if ".experts." not in name}
    for name, tensor in kept.items():
        assert same_bytes(checkpoint.tensor(name), tensor), name
        assert checkpoint.scheme(name.removesuffix(".weight")) is None
    assert checkpoint.scheme(PREFIX) == "w4a16_nvfp4"
    assert checkpoint.config["model_type"] == "qwen3_moe"
    # With either of the two configs alone it reads the same.
    (tmp_path / "q" / "hf_quant_config.json").unlink()
    again = open_checkpoint(tmp_path / "q")
    assert again.scheme(PREFIX) == "w4a16_nvfp4"
    ignored = again.config["quantization_config"]["ignore"]
    matrices = [name for name, t in kept.items() if t.ndim == 2]
    assert sorted(ignored) == sorted(name.removesuffix(".weight") for name in matrices)
    moe = again.load_experts(PREFIX)
    down = torch.stack([floats[f"{PREFIX}.{e}.down_proj.weight"] for e in range(4)])
    assert torch.equal(moe.down_proj.weight, quantize_weight(down).codes)
    assert inspect_checkpoint(tmp_path / "q").all_problems() == []


def test_quantize_checkpoint_of_other_modules(source: Path, tmp_path: Path) -> None:
    """q, k and v share a global scale, as gate and up do: other engines run them as one."""
    quantize_checkpoint(source, tmp_path / "q", include=["*.self_attn.*"])
    checkpoint = open_checkpoint(tmp_path / "q")
    floats = load_file(source / "model.safetensors")
    attention = PREFIX.replace("mlp.experts", "self_attn")
    parts = [floats[f"{attention}.{name}.weight"] for name in ("q_proj", "k_proj")]
    codes, _, global_scale = quantize_weight(torch.cat(parts))
    rows = 0
    for name, part in zip(("q_proj", "k_proj"), parts, strict=True):
        linear = checkpoint.load_linear(f"{attention}.{name}")
        assert torch.equal(linear.global_scale, global_scale)
        assert torch.equal(linear.codes, codes[rows : rows + len(part)])
        rows += len(part)
    assert checkpoint.scheme(PREFIX) is None


def test_quantize_checkpoint_with_static_input_scales(source: Path, tmp_path: Path) -> None:
    """From a calibrated module's amax to the same input scales in the checkpoint."""
    quantize_checkpoint(source, tmp_path / "weights")
    moe = load_experts(tmp_path / "weights", PREFIX)
    with calibrate(nn.ModuleList([moe])):
        moe(torch.randn(64, 48), torch.randint(4, (64, 2)), torch.rand(64, 2))
    amax = input_amax(moe, PREFIX)
    assert len(amax) == 12
    quantize_checkpoint(source, tmp_path / "static", input_amax=amax)
    checkpoint = open_checkpoint(tmp_path / "static")
    assert checkpoint.scheme(PREFIX) == "nvfp4"
    loaded = checkpoint.load_experts(PREFIX, activation_scale="static")
    for name, projection in loaded.projections().items():
        expected = moe.projections()[name]
        assert torch.equal(projection.weight, expected.weight)
        torch.testing.assert_close(projection.input_scale, expected.input_scale, rtol=2e-7, atol=0)
    del amax[f"{PREFIX}.3.up_proj"]
    with pytest.raises(ValueError, match=r"positive, finite value for .*3\.up_proj, got None"):
        quantize_checkpoint(source, tmp_path / "other", input_amax=amax)
    assert not (tmp_path / "other.partial").exists()


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4"])
def test_quantize_checkpoint_of_stacked_experts(tmp_path: Path, model_type: str) -> None:
    """Transposed in the source and in the result; one global scale for all experts."""
    floats = {
        f"{PREFIX}.gate_up_proj": torch.randn(3, 48, 64).bfloat16(),
        f"{PREFIX}.down_proj": torch.randn(3, 32, 48).bfloat16(),
        f"{PREFIX}.gate_up_proj_bias": torch.randn(3, 64).bfloat16(),
        f"{PREFIX}.down_proj_bias": torch.randn(3, 48).bfloat16(),
    }
    source = write_source(tmp_path / "source", floats, {"model_type": model_type})
    quantize_checkpoint(source, tmp_path / "q")
    checkpoint = open_checkpoint(tmp_path / "q")
    assert checkpoint.info(f"{PREFIX}.gate_up_proj").shape == (3, 24, 64)
    assert checkpoint.info(f"{PREFIX}.down_proj_weight_scale").shape == (3, 2, 48)
    moe = checkpoint.load_experts(PREFIX)
    w = floats[f"{PREFIX}.gate_up_proj"].transpose(1, 2)
    order = torch.cat([torch.arange(0, 64, 2), torch.arange(1, 64, 2)])
    if model_type == "llama4":
        order = torch.arange(64)
    one = w.abs().amax().float() / 2688
    expected = quantize_weight(w[:, order], one.expand(3).contiguous())
    assert torch.equal(moe.first_proj.weight, expected.codes)
    assert same_bytes(moe.first_proj.weight_scale, expected.block_scale)
    assert (moe.first_proj.weight_scale_2 == one).all()
    assert torch.equal(moe.first_proj.bias, floats[f"{PREFIX}.gate_up_proj_bias"][:, order])
    w = floats[f"{PREFIX}.down_proj"].transpose(1, 2).float()
    decoded = dequantize_nvfp4(
        moe.down_proj.weight, moe.down_proj.weight_scale, moe.down_proj.weight_scale_2
    )
    assert float((decoded - w).norm() / w.norm()) < 0.11


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch: pytest.MonkeyPatch, num_shards: int) -> list[Path]:
    """Stop the run in the middle of writing the next shard; returns the shards begun."""
    save = quantize.save_file
    begun: list[Path] = []

    def interrupted(tensors: Tensors, path: Path, **options: Any) -> None:
        begun.append(Path(path))
        if len(begun) > num_shards:
            Path(path).write_bytes(b"half a file")
            raise Interrupted
        save(tensors, path, **options)

    monkeypatch.setattr(quantize, "save_file", interrupted)
    return begun


def test_quantize_checkpoint_resumes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4000
    quantize_checkpoint(source, tmp_path / "whole", max_shard_bytes=size)
    target, partial = tmp_path / "q", tmp_path / "q.partial"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(Interrupted):
            quantize_checkpoint(source, target, max_shard_bytes=size)
    assert not target.exists()
    done = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(done) == 2
    with monkeypatch.context() as patch:
        begun = interrupt_after(patch, 100)
        quantize_checkpoint(source, target, max_shard_bytes=size)
    assert not partial.exists()
    assert not {path.name.removesuffix(".tmp") for path in begun} & done.keys()
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(expected) > 5
    assert {path.name: path.read_bytes() for path in target.iterdir()} == expected
    for name, time in done.items():
        assert (target / name).stat().st_mtime_ns == time


def test_quantize_checkpoint_resumes_nothing_else(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(Interrupted):
            quantize_checkpoint(source, tmp_path / "q", max_shard_bytes=4000)
    with pytest.raises(ValueError, match=r"q\.partial: was begun with other options"):
        quantize_checkpoint(source, tmp_path / "q", max_shard_bytes=5000)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"q\.partial: was begun with .* or another source"):
        quantize_checkpoint(source, tmp_path / "q", max_shard_bytes=4000)
    (tmp_path / "r.partial").mkdir()
    (tmp_path / "r.partial" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"r\.partial: is in the way; delete it"):
        quantize_checkpoint(source, tmp_path / "r")


def changed(name: str, value: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{PREFIX}.{name}": value})


REFUSED: dict[str, tuple[Callable[[Tensors], None], dict[str, Any], str]] = {
    "fp8": (
        changed("1.up_proj.weight", torch.ones(32, 48).to(torch.float8_e4m3fn)),
        {},
        r"model\.safetensors: .*1\.up_proj\.weight must be bf16, fp16 or fp32 .* got torch\.float8",
    ),
    "k": (
        changed("1.down_proj.weight", torch.ones(48, 24)),
        {},
        r"1\.down_proj\.weight: K must be a multiple of 16, got 24; leave the module out",
    ),
    "nan": (
        changed("1.down_proj.weight", torch.full((48, 32), torch.nan)),
        {},
        r"1\.down_proj\.weight holds Inf or NaN and can not be quantized",
    ),
    "inf_in_the_fused_one": (
        changed("1.up_proj.weight", torch.full((32, 48), -torch.inf)),
        {},
        r"1\.up_proj\.weight holds Inf or NaN",
    ),
    "stacked": (
        changed("gate_up_proj", torch.ones(4, 48, 64)),
        {"model_type": "new"},
        r"gate_up_proj is stacked; of model_type 'new' it is not known how",
    ),
    "quantized": (
        lambda tensors: None,
        {"quantization_config": {"quant_method": "fp8"}},
        r"config\.json: is quantized already",
    ),
}


@pytest.mark.parametrize(("change", "config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_quantize_checkpoint_refuses(
    tmp_path: Path, change: Callable[[Tensors], None], config: dict[str, Any], message: str
) -> None:
    tensors = float_tensors()
    change(tensors)
    source = write_source(tmp_path / "source", tensors, config)
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(source, tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_quantize_checkpoint_refuses_arguments(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"include: \['\*\.nothing'\] match no linear module"):
        quantize_checkpoint(source, tmp_path / "q", include=["*.nothing"])
    (tmp_path / "q").mkdir()
    with pytest.raises(ValueError, match=r"destination: .*q exists already"):
        quantize_checkpoint(source, tmp_path / "q")
    with pytest.raises(CheckpointError, match="no such directory"):
        quantize_checkpoint(tmp_path / "nowhere", tmp_path / "r")


def test_quantize_checkpoint_of_zeros(tmp_path: Path) -> None:
    """An expert that was never trained: global scale 1, as for every zero tensor."""
    tensors = {name: torch.zeros_like(t) for name, t in float_tensors(2).items()}
    source = write_source(tmp_path / "source", tensors)
    quantize_checkpoint(source, tmp_path / "q")
    moe = load_experts(tmp_path / "q", PREFIX)
    assert (moe.first_proj.weight_scale_2 == 1).all()
    assert not moe.first_proj.weight.any()


def test_quantize_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modules = [f"{PREFIX}.{e}.{n}" for e in range(4) for n in ("gate_proj", "up_proj", "down_proj")]
    amax_file = tmp_path / "amax.json"
    amax_file.write_text(json.dumps(dict.fromkeys(modules, 26.88)))
    arguments = ["quantize", str(source), str(tmp_path / "q"), "--input-amax", str(amax_file)]
    assert main(arguments) == 0
    moe = load_experts(tmp_path / "q", PREFIX, activation_scale="static")
    torch.testing.assert_close(moe.down_proj.input_scale, torch.full((4,), 0.01))
    assert main(arguments) == 1
    assert "exists already" in capsys.readouterr().err


def test_input_amax_refuses_what_it_can_not_name() -> None:
    with pytest.raises(ValueError, match="must be gated"):
        input_amax(NVFP4MoE(32, 16, 2, activation="relu2", gated=False), PREFIX)
    with pytest.raises(ValueError, match=r"needs gate_up_proj\.input_scale"):
        input_amax(NVFP4MoE(32, 16, 2), PREFIX)


def test_quantize_command_calibrates(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text goes to huggingface.calibrate_checkpoint line by line, its amax to the scales."""
    calls: list[tuple[Any, ...]] = []

    def calibrate_checkpoint(directory: Path, texts: Any, *, device: str) -> dict[str, float]:
        calls.append((directory, list(texts), device))
        modules = load_file(directory / "model.safetensors")
        return {name.removesuffix(".weight"): 2.688 for name in modules}

    huggingface = ModuleType("nvfp4_ops.huggingface")
    monkeypatch.setattr(huggingface, "calibrate_checkpoint", calibrate_checkpoint, raising=False)
    monkeypatch.setitem(sys.modules, huggingface.__name__, huggingface)
    (tmp_path / "text.txt").write_text("one\n\ntwo\n")
    arguments = ["--calibrate", str(tmp_path / "text.txt")]
    command = ["quantize", str(source), str(tmp_path / "q"), *arguments]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0)
        with pytest.raises(Interrupted):
            main(command)
    assert main(command) == 0
    assert calls == [(source, ["one", "two"], "cpu")], "once for both runs"
    assert main(command) == 1, "q exists"
    assert not list(tmp_path.glob("*.json"))
    moe = load_experts(tmp_path / "q", PREFIX, activation_scale="static")
    torch.testing.assert_close(moe.down_proj.input_scale, torch.full((4,), 0.001))
    (tmp_path / "text.txt").write_text("three")
    (tmp_path / "q").rename(tmp_path / "r")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0)
        with pytest.raises(Interrupted):
            main(command)
    (tmp_path / "text.txt").write_text("four")
    assert main(command) == 0
    assert [texts for _, texts, _ in calls[1:]] == [["three"], ["four"]], "another calibration"


def test_command_says_which_packages_it_lacks(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["inspect", str(data / "ct_qwen3_moe")]) == 1
    assert "pip install 'nvfp4-ops[cli,hf]'" in capsys.readouterr().err


def test_examples_run(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    import load_experts as load_example
    import quantize_checkpoint as quantize_example

    quantize_example.main(str(source), str(tmp_path / "q"))
    assert f"{PREFIX}: 4 experts, w4a16_nvfp4" in capsys.readouterr().out
    for arguments, hidden in (((), 128), ((str(tmp_path / "q"),), 48)):
        load_example.main(*arguments)
        assert f"(4, {hidden}) -> (4, {hidden})" in capsys.readouterr().out
