"""calibrate: the amax that the projections really see."""

import pytest
import torch
from test_moe import EXPERTS, HIDDEN, decoded, make_inputs, make_moe

import nvfp4_ops


def test_calibrate_records_amax_of_tokens_and_rows() -> None:
    moe = make_moe("per_token")
    x, index, weights = make_inputs(50)
    index[index == 5] = 6
    with nvfp4_ops.calibrate(moe):
        moe(x[:20], index[:20], weights[:20])
        moe(x[20:], index[20:], weights[20:])
        moe(x[:0], index[:0], weights[:0])
    assert moe.activation_scale == "per_token"
    tokens = x.abs().max().float() / 2688
    assert torch.equal(moe.gate_up_proj.input_scale, tokens.expand(EXPERTS, 2))

    gate, up = decoded(moe, "gate_up_proj").chunk(2, dim=1)
    expected = torch.zeros(EXPERTS)
    for t in range(50):
        for expert in index[t]:
            g, u = gate[expert] @ x[t].double(), up[expert] @ x[t].double()
            hidden = (torch.nn.functional.silu(g) * u).float().bfloat16()
            expected[expert] = max(expected[expert], hidden.abs().max().float())
    # Expert 5 saw nothing and takes the largest.
    assert expected[5] == 0
    expected[5] = expected.max()
    assert torch.equal(moe.down_proj.input_scale, expected / 2688)


def test_calibrate_makes_static_equal_per_tensor_on_the_same_batch() -> None:
    """gate_up sees the same scale in both modes; down's differ by expert only."""
    moe = make_moe()
    inputs = make_inputs(32)
    with nvfp4_ops.calibrate(moe):
        weight_only = moe(*inputs)
    moe.activation_scale = "static"
    static = moe(*inputs)
    error = (static - weight_only).float().norm() / weight_only.float().norm()
    assert 0.02 < error < 0.25


def test_calibrate_refuses_models_and_data_it_can_not_use() -> None:
    with (
        pytest.raises(ValueError, match="model: has no NVFP4MoE"),
        nvfp4_ops.calibrate(torch.nn.Linear(2, 2)),
    ):
        pass
    moe = make_moe("per_token")
    with pytest.raises(ValueError, match="calibration saw no rows"), nvfp4_ops.calibrate(moe):
        pass
    x, index, weights = make_inputs(4)
    x[0, 0] = torch.inf
    with pytest.raises(ValueError, match="Inf or NaN"), nvfp4_ops.calibrate(moe):
        moe(x, index, weights)
    assert moe.gate_up_proj.input_scale is None
    assert moe.activation_scale == "per_token"
    assert moe(x[1:], index[1:], weights[1:]).shape == (3, HIDDEN)
