"""What PyTorch asks of every op: functional schema, fakes that tell the truth, compile, export."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_bytes_equal
from samples import SAMPLES, Sample, int32, offs_of, operands, random_sf
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

import nvfp4_ops

ROWS, OTHER_ROWS = 200, 300
"""They need two and three 128-row tiles (a size of one is specialised on)."""

# One sample of each op is compiled by Inductor too; it is slow.
INDUCTOR_SAMPLES = list({sample.op: sample for sample in reversed(SAMPLES)}.values())

each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.id)
each_op = pytest.mark.parametrize("op", sorted(nvfp4_ops.backend_info()))


def overload(op: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.nvfp4_ops, op).default


def leaves(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def assert_same_results(actual: Any, expected: Any) -> None:
    assert len(leaves(actual)) == len(leaves(expected))
    for i, (got, want) in enumerate(zip(leaves(actual), leaves(expected), strict=True)):
        assert_bytes_equal(got, want, f"output {i}")
        assert got.stride() == want.stride()


def metadata(x: Tensor) -> tuple[Any, ...]:
    """All that a fake promises; the stride of a dimension without a second element says nothing."""
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    return x.shape, x.dtype, x.device, strides if x.numel() else []


@pytest.fixture
def _fresh_dynamo() -> None:
    torch.compiler.reset()


@pytest.fixture
def _allclose_knows_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """opcheck's test_schema compares inputs before and after with ``torch.allclose``, which the
    CPU has no float8 kernel for; their bytes tell the same."""
    allclose = torch.allclose

    def bytes_or_allclose(lhs: Tensor, rhs: Tensor, **tolerance: Any) -> bool:
        if lhs.dtype == rhs.dtype == torch.float8_e4m3fn:
            return torch.equal(lhs.view(torch.uint8), rhs.view(torch.uint8))
        return allclose(lhs, rhs, **tolerance)

    monkeypatch.setattr(torch, "allclose", bytes_or_allclose)


def test_ops_every_one_has_three_samples() -> None:
    counts = {op: sum(sample.op == op for sample in SAMPLES) for op in nvfp4_ops.backend_info()}
    assert {sample.op for sample in SAMPLES} == set(counts)
    assert min(counts.values()) >= 3, counts
    assert len({sample.id for sample in SAMPLES}) == len(SAMPLES)


@each_op
def test_ops_schema_is_functional(op: str) -> None:
    schema = overload(op)._schema
    assert not schema.is_mutable
    assert all(x.alias_info is None for x in (*schema.arguments, *schema.returns))
    assert torch.Tag.pt2_compliant_tag in overload(op).tags


@each_sample
def test_ops_neither_write_nor_return_their_inputs(sample: Sample) -> None:
    arguments = sample.arguments(ROWS)
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    before = [x.clone() for x in tensors]
    results = leaves(overload(sample.op)(*arguments, **sample.op_options()))
    for got, want in zip(tensors, before, strict=True):
        assert_bytes_equal(got, want, "input")
    storages = [x.untyped_storage().data_ptr() for x in (*tensors, *results)]
    assert len(set(storages)) == len(storages)


@pytest.mark.usefixtures("_allclose_knows_float8")
@each_sample
def test_ops_pass_opcheck(sample: Sample) -> None:
    torch.library.opcheck(overload(sample.op), sample.arguments(9), sample.op_options())


@pytest.mark.usefixtures("_allclose_knows_float8")
def test_ops_opcheck_sees_a_write_to_float8() -> None:
    with torch.library._scoped_library("nvfp4_ops_test", "DEF") as library:
        library.define("negate(Tensor x) -> Tensor")

        def negate(x: Tensor) -> Tensor:
            x.view(torch.uint8).bitwise_xor_(0x80)
            return x.clone()

        library.impl("negate", negate, "CPU")
        torch.library.register_fake("nvfp4_ops_test::negate", torch.empty_like, lib=library)
        op = torch.ops.nvfp4_ops_test.negate.default
        with pytest.raises(Exception, match="mutated"):
            torch.library.opcheck(op, (random_sf(3, lowest=1),), test_utils="test_schema")


@pytest.mark.parametrize("num_rows", [0, 1, 128, 129])
@each_sample
def test_ops_fake_has_the_metadata_of_eager(sample: Sample, num_rows: int) -> None:
    arguments, options = sample.arguments(num_rows), sample.op_options()
    expected = leaves(overload(sample.op)(*arguments, **options))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments]
        options = {
            key: mode.from_tensor(x) if isinstance(x, Tensor) else x for key, x in options.items()
        }
        actual = leaves(overload(sample.op)(*fakes, **options))
    for got, want in zip(actual, expected, strict=True):
        assert metadata(got) == metadata(want)


def check_compiled(sample: Sample, backend: str) -> None:
    """Compile for some rows, run with more: the same bytes as eager, and nothing compiled again."""
    function = sample.function()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    arguments = sample.function_arguments(ROWS)
    assert_same_results(compiled(*arguments), function(*arguments))
    arguments = sample.function_arguments(OTHER_ROWS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_results(compiled(*arguments), function(*arguments))


@pytest.mark.usefixtures("_fresh_dynamo")
@each_sample
def test_ops_compile_once_for_all_row_counts(sample: Sample) -> None:
    check_compiled(sample, "aot_eager")


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("sample", INDUCTOR_SAMPLES, ids=lambda sample: sample.id)
def test_ops_compile_with_inductor(sample: Sample) -> None:
    check_compiled(sample, "inductor")


class Program(torch.nn.Module):
    """``torch.export`` takes modules."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def dynamic_dims(arguments: tuple[Any, ...], others: tuple[Any, ...]) -> tuple[Any, ...]:
    """Dim.DYNAMIC wherever a size follows the number of rows: export fails if it is fixed."""
    return tuple(
        {i: Dim.DYNAMIC for i, size in enumerate(x.shape) if size != other.shape[i]}
        if isinstance(x, Tensor)
        else None
        for x, other in zip(arguments, others, strict=True)
    )


@pytest.mark.usefixtures("_fresh_dynamo")
@each_sample
def test_ops_export_with_dynamic_rows(sample: Sample) -> None:
    function = sample.function()
    arguments = sample.function_arguments(ROWS)
    others = sample.function_arguments(OTHER_ROWS)
    dims = dynamic_dims(arguments, others)
    assert any(dims), "no size follows the number of rows"
    program = torch.export.export(Program(function), arguments, dynamic_shapes=(dims,))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert overload(sample.op) in targets
    assert_same_results(program.module()(*others), function(*others))


def test_ops_export_names_the_token_dimension() -> None:
    tokens = Dim("tokens", min=2, max=4096)
    x, scale = torch.randn(ROWS, 32), torch.tensor(0.01)
    program = torch.export.export(
        Program(nvfp4_ops.quantize_nvfp4), (x, scale), dynamic_shapes=(({0: tokens}, {}),)
    )
    other = torch.randn(OTHER_ROWS, 32)
    assert_same_results(program.module()(other, scale), nvfp4_ops.quantize_nvfp4(other, scale))


BAD_WHEN_TRACED: list[tuple[str, str, tuple[Any, ...], str]] = [
    (
        "quantize-k",
        "quantize_nvfp4",
        (torch.ones(4, 40), torch.ones(())),
        "x: K must be a multiple of 16, got 40",
    ),
    (
        "swizzle-rank",
        "swizzle_sf",
        (random_sf(1, 1, 32, 16),),
        "sf: must be linear, (R, K/16) or (E, N, K/16), got shape (1, 1, 32, 16)",
    ),
    (
        "mm-alpha",
        "grouped_scaled_mm",
        tuple(operands([2, 1])._replace(alpha=torch.ones(3))),
        "alpha: must be (E,) or (E, 2) = (2,), got shape (3,)",
    ),
    (
        "mm-dtype",
        "grouped_scaled_mm",
        tuple(operands([2, 1])._replace(sf_a=None)),
        "a without sf_a: must be bfloat16 or float16 or float32, got uint8",
    ),
    (
        "combine-shape",
        "combine",
        (torch.ones(6, 4), torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 1)),
        "top_k_weights: must be (T, top_k) = (3, 2), got shape (3, 1)",
    ),
    ("top-k", "softmax_top_k", (torch.ones(3, 4), 5), "top_k: must be between 1 and E = 4, got 5"),
]


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [bad[1:] for bad in BAD_WHEN_TRACED],
    ids=[bad[0] for bad in BAD_WHEN_TRACED],
)
def test_ops_compiled_errors_name_the_argument(
    op: str, arguments: tuple[Any, ...], message: str
) -> None:
    compiled = torch.compile(
        getattr(nvfp4_ops, op), fullgraph=True, dynamic=False, backend="aot_eager"
    )
    with pytest.raises(Exception, match=re.escape(message)):
        compiled(*arguments)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_ops_compiled_graph_checks_the_next_shape() -> None:
    compiled = torch.compile(
        nvfp4_ops.quantize_nvfp4, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    scale = torch.ones(())
    compiled(torch.ones(4, 32), scale)
    with pytest.raises(Exception, match=r"x: K must be a multiple of 16, got"):
        compiled(torch.ones(4, 40), scale)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_ops_compiled_graph_checks_offs_values() -> None:
    compiled = torch.compile(
        nvfp4_ops.grouped_scaled_mm, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    good = operands([2, 1])
    compiled(*good)
    with pytest.raises(ValueError, match=r"offs: .* got \[3, 2\]"):
        compiled(*good._replace(offs=int32(3, 2)))


@pytest.mark.parametrize("through", ["function", "dispatcher"])
def test_ops_backward_raises_and_only_gradients_ask_for_it(through: str) -> None:
    mm = (
        nvfp4_ops.grouped_scaled_mm
        if through == "function"
        else torch.ops.nvfp4_ops.grouped_scaled_mm
    )
    made = operands([2, 0, 3], a_dtype=torch.bfloat16)
    expected = mm(*made)
    assert expected.grad_fn is None
    out = mm(*made._replace(a=made.a.clone().requires_grad_()))
    assert_bytes_equal(out.detach(), expected)
    with pytest.raises(NotImplementedError, match="grouped_scaled_mm is for inference and has no"):
        out.sum().backward()
    with torch.no_grad():
        assert not mm(*made._replace(a=made.a.clone().requires_grad_())).requires_grad


def test_ops_are_seen_by_dispatch_modes() -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.func = func
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        nvfp4_ops.quantize_nvfp4(torch.ones(2, 32), torch.ones(()))
    assert seen.func is torch.ops.nvfp4_ops.quantize_nvfp4.default


def test_ops_take_arguments_by_name() -> None:
    made = operands([2, 0, 3], a_dtype=torch.bfloat16, segments=2)
    expected = nvfp4_ops.grouped_scaled_mm(*made, activation="silu_mul", out_dtype=torch.float32)
    actual = torch.ops.nvfp4_ops.grouped_scaled_mm(
        offs=offs_of([2, 0, 3]),
        activation="silu_mul",
        out_dtype="float32",
        **{key: value for key, value in made._asdict().items() if key != "offs"},
    )
    assert_bytes_equal(actual, expected)
