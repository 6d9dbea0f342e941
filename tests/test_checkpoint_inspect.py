"""inspect_checkpoint: the numbers of the report, and that nothing wrong goes unsaid."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import PREFIX, make_moe, stacked, write_checkpoint

from nvfp4_ops import inspect_checkpoint
from nvfp4_ops.__main__ import MAX_PROBLEMS, main
from nvfp4_ops.checkpoint import expert_tensors, load_experts


def test_inspect_reports_an_authentic_checkpoint(data: Path) -> None:
    directory = data / "models" / "modelopt_qwen3_moe_experts_only"
    report = inspect_checkpoint(directory)
    assert (report.producer, report.all_problems()) == ("ModelOpt", [])
    assert report.linear_layers == {}
    assert [e.prefix for e in report.experts] == [PREFIX, PREFIX.replace("0", "1")]
    for experts in report.experts:
        moe = load_experts(directory, experts.prefix)
        sizes = experts.num_experts, experts.hidden_size, experts.intermediate_size
        assert (*sizes, experts.scheme) == (8, 128, 64, "nvfp4")
        projections = moe.projections().values()
        for attribute, expected in (
            ("weight_scale_2", experts.global_scales),
            ("input_scale", experts.input_scales),
        ):
            scales = torch.cat([getattr(p, attribute).flatten() for p in projections])
            assert expected == (float(scales.min()), float(scales.max()))
        block_scales = torch.cat([p.weight_scale.float().flatten() for p in projections])
        assert experts.saturated == float((block_scales == 448).double().mean())
        assert (experts.num_mismatched, experts.max_mismatch) == (0, 1.0)


def test_inspect_reports_gate_and_up_that_differ(tmp_path: Path) -> None:
    moe = make_moe()
    moe.first_proj.weight_scale_2.copy_(torch.tensor([[1, 1], [2, 0.5], [1, 1.5], [3, 3.0]]))
    write_checkpoint(tmp_path, expert_tensors(moe, PREFIX))
    (experts,) = inspect_checkpoint(tmp_path).experts
    assert (experts.num_mismatched, experts.max_mismatch) == (2, 4.0)


def test_inspect_reports_saturated_block_scales(tmp_path: Path) -> None:
    tensors = expert_tensors(make_moe(), PREFIX)
    scales = [name for name in tensors if name.endswith("weight_scale")]
    for name in scales:
        tensors[name].view(torch.uint8).fill_(0x38)
    tensors[scales[0]].fill_(448)
    write_checkpoint(tmp_path, tensors)
    (experts,) = inspect_checkpoint(tmp_path).experts
    share = tensors[scales[0]].numel() / sum(tensors[name].numel() for name in scales)
    assert experts.saturated == pytest.approx(share)


def test_inspect_reports_every_problem(tmp_path: Path) -> None:
    moe, other = make_moe(), PREFIX.replace("0", "1")
    tensors = expert_tensors(moe, PREFIX) | expert_tensors(moe, other)
    tensors |= {
        "model.layers.2.mlp.experts.0.gate_proj.weight": torch.ones(16, 16).bfloat16(),
        "model.layers.0.self_attn.q_proj.weight": moe.down_proj.weight[0].clone(),
        "model.layers.0.self_attn.q_proj.weight_scale": moe.down_proj.weight_scale[0].clone(),
        "lm_head.weight": torch.zeros(16, 16, dtype=torch.uint8),
    }
    tensors[f"{PREFIX}.1.up_proj.weight_scale_2"].fill_(0)
    tensors[f"{PREFIX}.3.down_proj.input_scale"].fill_(torch.inf)
    tensors[f"{other}.0.up_proj.pre_quant_scale"] = torch.ones(48)
    report = inspect_checkpoint(write_checkpoint(tmp_path, tensors))
    first, second, third = report.experts
    assert ["1.up_proj" in first.problems[0], "3.down_proj" in first.problems[1]] == [True, True]
    assert len(first.problems) == 2
    assert "pre_quant_scale is not known" in second.problems[0]
    assert (third.scheme, third.problems) == (None, ())
    assert report.linear_layers == {"nvfp4": 1}
    assert len(report.problems) == 1
    assert "lm_head is stored in 4 bits, but" in report.problems[0]


def test_inspect_reports_stacked_experts(tmp_path: Path) -> None:
    tensors = stacked(make_moe(bias=True), interleaved=True)
    for name in ("gate_up_proj", "down_proj"):
        tensors[f"{PREFIX}.{name}_weight_scale_2"] = torch.tensor(0.5)
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_algo": "NVFP4"}}
    (experts,) = inspect_checkpoint(write_checkpoint(tmp_path, tensors, config=config)).experts
    assert (experts.num_experts, experts.hidden_size, experts.intermediate_size) == (4, 48, 32)
    assert (experts.global_scales, experts.input_scales) == ((0.5, 0.5), None)


def test_inspect_reports_what_can_not_be_opened(tmp_path: Path) -> None:
    report = inspect_checkpoint(tmp_path)
    assert (report.producer, report.experts) == (None, ())
    assert "has no hf_quant_config.json or config.json" in report.problems[0]
    write_checkpoint(tmp_path, {"model.norm.weight": torch.ones(4)})
    assert "has no experts" in inspect_checkpoint(tmp_path).all_problems()[0]


def test_inspect_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(data / "ct_qwen3_moe")]) == 0
    table = capsys.readouterr().out
    for text in (PREFIX, "CompressedTensors", "8 x 128 x 64", "gate != up"):
        assert text in table
    assert main(["inspect", "--json", str(data / "ct_qwen3_moe")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert f"{report['experts'][0]['saturated']:.2%}" in table
    assert report["experts"][0]["num_experts"] == 8
    assert report["problems"] == []

    tensors = expert_tensors(make_moe(), PREFIX)
    broken = {
        f"{PREFIX.replace('0', str(layer))}{name.removeprefix(PREFIX)}": tensor.clone()
        for layer in range(MAX_PROBLEMS // 4 + 1)
        for name, tensor in tensors.items()
    }
    for name in broken:
        if name.endswith("down_proj.weight_scale_2"):
            broken[name].fill_(torch.nan)
    assert main(["inspect", str(write_checkpoint(tmp_path, broken))]) == 1
    out = capsys.readouterr().out
    assert out.count("refused: ") == MAX_PROBLEMS
    assert "and 4 more; --json has them all" in out
