"""Calibrate static input scales: the amax of what each projection is given."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nvfp4_ops.reference import expert_of_row, global_scale_of_amax

if TYPE_CHECKING:
    from nvfp4_ops.moe import NVFP4MoE


class AmaxObserver:
    """Running amax of the tokens (one for all experts) and of each expert's intermediate rows."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.tokens = torch.zeros((), device=device)
        # One more entry collects the rows of no expert and is never read.
        self.rows = torch.zeros(num_experts + 1, device=device)

    @torch.no_grad()
    def observe(self, x_TD: Tensor, hidden_RF: Tensor, offs_E: Tensor) -> None:
        if x_TD.shape[0] == 0:
            return
        self.tokens = torch.maximum(self.tokens, x_TD.abs().amax().float())
        row_amax = hidden_RF.abs().amax(dim=-1).float()
        expert = expert_of_row(offs_E, hidden_RF.shape[0])
        self.rows = self.rows.scatter_reduce(0, expert, row_amax, "amax")

    def input_scales(self) -> tuple[Tensor, Tensor]:
        """Decode scales () of the tokens and (E,) of the intermediate rows.

        An expert that saw no row takes the largest amax of the others: too large a scale costs
        next to nothing (the block scales have 2^13 of head-room), too small a one clips.
        """
        rows = self.rows[:-1]
        rows = torch.where(rows == 0, rows.amax(), rows)
        return global_scale_of_amax(self.tokens), global_scale_of_amax(rows)


@contextmanager
def calibrate(model: nn.Module) -> Iterator[None]:
    """Record amax in every NVFP4MoE of ``model`` while it runs, then set the input scales.

    Inside, the modules run weight-only, whatever their mode; afterwards ``"static"`` can be
    assigned to ``activation_scale``. Run it eagerly, on inputs like those of real use:

        with nvfp4_ops.calibrate(model):
            for batch in batches:
                model(batch)

    Raises:
        ValueError: the model holds no NVFP4MoE, or one of them was given nothing, zeros, Inf or
            NaN.
    """
    from nvfp4_ops.moe import NVFP4MoE

    layers = {name: m for name, m in model.named_modules() if isinstance(m, NVFP4MoE)}
    if not layers:
        raise ValueError("model: has no NVFP4MoE to calibrate")
    modes = {name: layer.activation_scale for name, layer in layers.items()}
    for layer in layers.values():
        layer._activation_scale = None
        layer._observer = AmaxObserver(layer.num_experts, layer.down_proj.weight.device)
    try:
        yield
        scales = {name: _input_scales(name, layer) for name, layer in layers.items()}
        for name, layer in layers.items():
            tokens, rows = scales[name]
            layer.first_proj.set_input_scale(tokens.expand_as(layer.first_proj.weight_scale_2))
            layer.down_proj.set_input_scale(rows)
    finally:
        for name, layer in layers.items():
            layer._observer = None
            layer._activation_scale = modes[name]


def _input_scales(name: str, layer: "NVFP4MoE") -> tuple[Tensor, Tensor]:
    observer = layer._observer
    assert observer is not None
    amax = torch.cat([observer.tokens.view(1), observer.rows[:-1].amax().view(1)])
    if not bool(((amax > 0) & amax.isfinite()).all()):
        raise ValueError(f"{name or 'model'}: calibration saw no rows, only zeros, Inf or NaN")
    return observer.input_scales()
