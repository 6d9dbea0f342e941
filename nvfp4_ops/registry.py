"""How an op is registered: schema, fake kernel and one implementation per device type.

``torch.library.Library`` is used directly rather than ``custom_op``, whose wrapper costs tens of
microseconds a call. A kernel and the fake kernel of an op call the same check and the same shape
function, so a traced graph and a run can not disagree. Decoding calls a dozen ops a layer for
microseconds of GPU work each: what a call of plain tensors does not need, it does not pay, and what
an earlier one like it has found out (``plans``) it does not ask again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch.autograd import _profiler_enabled

from nvfp4_ops import plans as plans_module
from nvfp4_ops.plans import Plans, Run

NAMESPACE = "nvfp4_ops"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

DEVICE_TYPES = ("CPU", "CUDA")
_OPS: list[str] = []


def register(
    schema: str,
    *,
    fake: Callable[..., Any],
    kernel: Callable[..., Any],
    plan: Callable[..., Run | None] | None = None,
) -> Callable[..., Any]:
    """Define the op of ``schema`` and return a function that calls it.

    schema: ``name(args) -> returns`` in PyTorch's schema language, functional.
    fake: checks its arguments and returns empty outputs.
    kernel: computes, on every device type; checks its arguments unless there is a plan.
    plan: checks its arguments and returns what computes them, and any that differ in their memory
        alone, by GPU kernels; None where ``kernel`` does it. Needs a schema with tensors first.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    plans = None if plan is None else Plans(_num_leading_tensors(overload), plan)

    def planned(*args: Any) -> Any:
        assert plans is not None
        run = plans.find(args) or plans.make(args)
        return kernel(*args) if run is None else run(*args)

    for device_type in DEVICE_TYPES:
        _LIBRARY.impl(name, kernel if plans is None else planned, device_type)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)

    def backward(*_: Any) -> None:
        raise NotImplementedError(
            f"{NAMESPACE}.{name} is for inference and has no backward; run and compile it under "
            "torch.no_grad() or torch.inference_mode()"
        )

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, lib=_LIBRARY)
    _OPS.append(name)

    def dispatch(*args: Any) -> Any:
        # Autograd's kernel is Python and half of what a call costs; it has nothing to say of
        # arguments without gradients.
        if _needs_gradient(args):
            return overload(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return overload(*args)
        run = None
        if plans is not None and is_planned():
            run = plans.find(args)
            if run is None and is_plain(args):
                run = plans.make(args)
        function = dispatch if run is None else run
        # Looked up once: another thread's recording may end at any moment.
        recording = plans_module.recording
        if recording is None:
            return function(*args)
        return recording.run(function, args, is_plan=run is not None)

    return call


def is_planned() -> bool:
    """Whether calls may use plans now."""
    # A profiler shows what is dispatched, a function mode wants to be asked.
    return not (_profiler_enabled() or _len_torch_function_stack())


def _num_leading_tensors(overload: torch._ops.OpOverload) -> int:
    return sum("Tensor" in str(argument.type) for argument in overload._schema.arguments)


def _needs_gradient(args: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, Tensor) and arg.requires_grad:
                return True
    return False


def is_plain(args: tuple[Any, ...]) -> bool:
    """Whether all that the dispatcher would do with a GPU's tensors is to call the kernel."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return (
        len(tensors) > 0
        and _len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not _needs_gradient(args)
        and all(
            type(tensor) in (Tensor, torch.nn.Parameter)
            and tensor.is_cuda
            and tensor.layout is torch.strided
            and not (tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor())
            for tensor in tensors
        )
    )


def registered_ops() -> Sequence[str]:
    """Names of the ops, in the order of their registration."""
    return tuple(_OPS)


# Argument checks shared by the ops. Each names argument, rule and value. Sizes can be symbolic.


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: must be {wanted}, got {got}")


def check_rank(name: str, tensor: Tensor, rank: int, layout: str) -> None:
    if tensor.ndim != rank:
        raise ValueError(f"{name}: must be {layout} (rank {rank}), got {shape_text(tensor)}")


def check_value(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """Raise ValueError where the condition is false; a guard of the graph where it is symbolic."""
    # torch._check_value takes two microseconds to see that True is true.
    if condition is not True:
        torch._check_value(condition, message)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], layout: str) -> None:
    # A fake tensor may have symbolic sizes, which a comparison as a whole would make constant.
    if type(tensor) is Tensor and tensor.shape == shape:
        return
    check_rank(name, tensor, len(shape), layout)
    for got, want in zip(tensor.shape, shape, strict=True):
        check_value(
            got == want,
            lambda: f"{name}: must be {layout} = {tuple(shape)}, got {shape_text(tensor)}",
        )


def check_multiple(name: str, dim: str, size: int, divisor: int) -> None:
    if type(size) is int and size % divisor == 0:
        return
    check_value(
        size % divisor == 0, lambda: f"{name}: {dim} must be a multiple of {divisor}, got {size}"
    )


def check_offs(offs: Tensor, num_rows: int) -> None:
    """offs (E,) int32, E >= 1. On the CPU, where reading costs nothing, the values too."""
    check_rank("offs", offs, 1, "the (E,) end row of each expert")
    check_dtype("offs", offs, torch.int32)
    check_value(offs.shape[0] >= 1, lambda: "offs: must have at least one expert, got (0,)")
    if offs.device.type != "cpu" or isinstance(offs, torch._subclasses.FakeTensor):
        return
    ends = offs.tolist()
    for before, after in zip([0, *ends], [*ends, num_rows], strict=True):
        if before > after:
            raise ValueError(
                "offs: must be the non-decreasing end rows of the experts, at most the number of "
                f"rows ({num_rows}), got {ends[:8]}{'...' if len(ends) > 8 else ''}"
            )


def check_indices(name: str, index: Tensor, size: int, of_what: str) -> None:
    """On the CPU, where reading costs nothing: -1 or 0 to size - 1."""
    if index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = int(index.min()), int(index.max())
    if low < -1 or high >= size:
        raise ValueError(
            f"{name}: must be -1 or one of the {size} {of_what}, got {low if low < -1 else high}"
        )


def check_same_device(name: str, tensor: Tensor | None, device: torch.device) -> None:
    if tensor is not None and tensor.device != device:
        raise ValueError(f"{name}: must be on {device} like the first argument, on {tensor.device}")


def check_same_devices(device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        check_same_device(name, tensor, device)


def shape_text(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"
