"""What an eager call need not do again: checks, choices and look-ups of one that was just like it.

A decoding step calls the same ops with tensors of the same kind over and over, and a check of every
argument in Python costs the host more than the launch. So the first such call makes a *plan*: a
function that allocates and launches, right for all arguments that differ from the first ones in
their memory alone. Later calls are recognised by one hash and by PyTorch's own guards in C++:
types, dtypes, shapes, strides, devices, gradients, dispatch keys and modes, all as they were. What
depends on values is not planned; what depends on addresses holds at multiples of ``ALIGNMENT``.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

Run = Callable[..., Any]
"""Takes the arguments of the op and returns its result."""

ALIGNMENT = 16
MAX_KEYS = 512
"""Of an op; prompts have any number of tokens. Beyond it the op starts over."""
MAX_PLANS_PER_KEY = 8

_all_plans: list["Plans"] = []
_num_suspensions = 0


def no_plan(*_: Any) -> None:
    return None


class Plan(NamedTuple):
    """pick: the tensors of the arguments. guards: whether they are like those it was made for."""

    pick: Callable[[tuple[Any, ...]], tuple[Tensor, ...]]
    guards: TensorGuards
    run: Run


class Plans:
    """The plans of one op.

    make: takes the op's arguments, checks them and returns the function that runs them, or None
        where there is no plan; raises what the op raises. Not needed by who calls ``keep``.
    num_tensors: how many of the arguments, the first ones, are tensors; all but the first of all
        may be None.
    """

    def __init__(self, num_tensors: int, make: Callable[..., Run | None] = no_plan) -> None:
        self._make = make
        self._num_tensors = num_tensors
        # Tuples that are replaced whole: threads read them without a lock.
        self._plans: dict[Hashable, tuple[Plan, ...]] = {}
        _all_plans.append(self)

    def __len__(self) -> int:
        return sum(map(len, self._plans.values()))

    def clear(self) -> None:
        self._plans.clear()

    def find(self, args: tuple[Any, ...]) -> Run | None:
        """The plan made for arguments like these, or None."""
        try:
            for pick, guards, run in self._plans.get(self._key(args), ()):
                tensors = pick(args)
                if guards.check(*tensors) and _are_aligned(tensors):
                    return None if _num_suspensions else run
        except (AttributeError, RuntimeError, TypeError):
            # Not tensors, or nested ones, which have no shape: the checks or the dispatcher will
            # say. Or symbolic sizes, which have no hash.
            pass
        return None

    def make(self, args: tuple[Any, ...]) -> Run | None:
        """A new plan for these arguments, kept for others; None where there can be none."""
        run = self._make(*args)
        if run is not None:
            self.keep(args, run)
        return run

    def keep(self, args: tuple[Any, ...], run: Run) -> None:
        """``run`` is the plan for these arguments, if there can be one."""
        if _num_suspensions:
            return
        present = [i for i, arg in enumerate(args[: self._num_tensors]) if arg is not None]
        pick = _pick(present)
        tensors = pick(args)
        # Guards do not know whether gradients are enabled, and where they are, those that require
        # one need the dispatcher. They refuse a tensor that is given twice.
        if any(tensor.requires_grad for tensor in tensors):
            return
        if not _are_aligned(tensors) or len(set(map(id, tensors))) < len(tensors):
            return
        sizes: Any = [list(tensor.shape) for tensor in tensors]
        strides: Any = [list(tensor.stride()) for tensor in tensors]
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        key = self._key(args)
        if key not in self._plans and len(self._plans) >= MAX_KEYS:
            self._plans.clear()
        others = self._plans.get(key, ())
        self._plans[key] = (Plan(pick, guards, run), *others)[:MAX_PLANS_PER_KEY]

    def _key(self, args: tuple[Any, ...]) -> Hashable:
        """Equal for arguments that are alike: which of them are None, those that are no tensors."""
        first = args[: self._num_tensors]
        return (first[0].shape, *map(type, first), args[self._num_tensors :])


def _pick(positions: list[int]) -> Callable[[Sequence[Any]], Any]:
    """What takes the values at these positions, one or more, out of a sequence."""
    if len(positions) > 1:
        return itemgetter(*positions)
    # The slice makes it a sequence.
    return itemgetter(slice(positions[0], positions[0] + 1))


def _are_aligned(tensors: tuple[Tensor, ...]) -> bool:
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    return addresses % ALIGNMENT == 0


def clear() -> None:
    """Forget the plans of all ops."""
    for plans in _all_plans:
        plans.clear()


@contextmanager
def suspended() -> Iterator[None]:
    """No plan is found in this context: every call asks anew for all it needs."""
    global _num_suspensions
    _num_suspensions += 1
    try:
        yield
    finally:
        _num_suspensions -= 1


class Recording:
    """The steps that a thread runs while it records, to be run again as one plan."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._is_inside_step = False
        self._is_complete = True
        self._steps: list[tuple[Run, tuple[Any, ...], Any]] = []

    def run(self, function: Run, args: tuple[Any, ...], *, is_plan: bool) -> Any:
        """function(*args) as a step, unless it is part of one, or another thread's.

        is_plan: whether it may be run again for arguments like these; else there is no plan.
        """
        if self._thread != threading.get_ident() or self._is_inside_step:
            return function(*args)
        self._is_inside_step = True
        try:
            result = function(*args)
        finally:
            self._is_inside_step = False
        self._is_complete &= is_plan
        self._steps.append((function, args, result))
        return result

    def plan(self, inputs: tuple[Any, ...], output: Tensor) -> Run | None:
        """From ``inputs``, some of them tensors, to ``output``; None where a step takes others."""
        if not self._is_complete or not self._steps or self._steps[-1][2] is not output:
            return None
        # Values by number: inputs, then constants, then the results of one step after the other.
        constants = [
            arg for _, args, _ in self._steps for arg in args if not isinstance(arg, Tensor)
        ]
        numbers = {id(value): i for i, value in enumerate(inputs) if isinstance(value, Tensor)}
        next_constant = len(inputs)
        next_result = next_constant + len(constants)
        steps = []
        for run, args, result in self._steps:
            chosen = []
            for arg in args:
                if not isinstance(arg, Tensor):
                    chosen.append(next_constant)
                    next_constant += 1
                elif id(arg) in numbers:
                    chosen.append(numbers[id(arg)])
                else:
                    return None
            results = result if isinstance(result, tuple) else (result,)
            for value in results:
                numbers[id(value)] = next_result
                next_result += 1
            steps.append((run, _pick(chosen), isinstance(result, tuple)))

        def replay(*inputs: Any) -> Any:
            values = [*inputs, *constants]
            result = None
            for run, pick, is_tuple in steps:
                result = run(*pick(values))
                if is_tuple:
                    values += result
                else:
                    values.append(result)
            return result

        return replay


recording: Recording | None = None
_recording_lock = threading.Lock()


@contextmanager
def record() -> Iterator[Recording | None]:
    """Record what this thread runs; None where another thread records, which is as well."""
    global recording
    if not _recording_lock.acquire(blocking=False):
        yield None
        return
    recording = Recording()
    try:
        yield recording
    finally:
        recording = None
        _recording_lock.release()


def step(function: Run, *args: Any) -> Any:
    """function(*args), which is no op, as a step of what is recorded."""
    if torch.compiler.is_compiling():
        return function(*args)
    # Looked up once: another thread's recording may end at any moment.
    current = recording
    return function(*args) if current is None else current.run(function, args, is_plan=True)
