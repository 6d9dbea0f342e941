"""The PTX machine itself: it computes, and it raises on what a GPU would do wrong in silence."""

import struct

import pytest
import torch
from ptx_machine import Kernel, Memory

HEADER = """.visible .entry k(
	.param .align 8 .b8 k_param_0[16]
)
.reqntid 64, 1, 1
{
	.reg .pred 	%p<9>;
	ld.param.b64 	%rd1, [k_param_0];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
	shl.b32 	%r2, %r1, 2;
"""
WAIT = "\tgriddepcontrol.wait;\n"
TO_SHARED = "\tst.shared.b32 	[%r2], %r1;\n"
BARRIER = "\tbar.sync 	0;\n"
# Of the thread 32 away, in the other warp.
FROM_OTHER_WARP = "\txor.b32 	%r3, %r2, 128;\n\tld.shared.b32 	%r4, [%r3];\n"
STORE = "\tst.global.b32 	[%rd3], %r4;\n"
RETURN = "\tret;\n}\n"


def run(*body: str) -> torch.Tensor:
    """Output of 64 threads with a buffer of 64 words."""
    memory, out = Memory(), torch.full((64,), -1, dtype=torch.int32)
    address = memory.add(out)
    Kernel(HEADER + "".join(body) + RETURN).launch(
        (1, 1), [struct.pack("<qi4x", address, 64)], memory
    )
    return memory.get(address, out)


def test_ptx_machine_exchanges_through_shared_memory() -> None:
    out = run(WAIT, TO_SHARED, BARRIER, FROM_OTHER_WARP, STORE)
    assert out.tolist() == [*range(32, 64), *range(32)]


def test_ptx_machine_threads_meet_after_a_loop_of_their_own_length() -> None:
    loop = (
        "\tmov.b32 	%r4, 0;\n$L__BB0_1:\n\tadd.s32 	%r4, %r4, 1;\n"
        "\tsetp.lt.s32 	%p1, %r4, %r1;\n\t@%p1 bra 	$L__BB0_1;\n"
    )
    assert run(WAIT, loop, BARRIER, STORE).tolist() == [1, *range(1, 64)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ((TO_SHARED, BARRIER, FROM_OTHER_WARP, STORE), "before griddepcontrol.wait"),
        ((WAIT, TO_SHARED, FROM_OTHER_WARP, STORE), "another warp has written here"),
        ((WAIT, FROM_OTHER_WARP, STORE), "uninitialized shared memory"),
        ((WAIT, TO_SHARED, BARRIER, FROM_OTHER_WARP, TO_SHARED), "another warp has read here"),
        ((WAIT, "\tst.shared.b32 	[%r5], %r1;\n"), "%r5"),
        (
            (WAIT, "\tmov.b32 	%r5, 8;\n\tst.shared.b32 	[%r5], %r1;\n"),
            "another warp writes here|two values for one address",
        ),
        (
            (WAIT, "\tmov.b32 	%r4, 0;\n\tst.global.b32 	[%rd3+4], %r4;\n"),
            "outside of every buffer",
        ),
        ((WAIT, "\tmov.b32 	%r4, 0;\n\tst.global.b32 	[%rd3+2], %r4;\n"), "misaligned"),
        (
            (
                "\tsetp.lt.s32 	%p1, %r1, 32;\n\t@%p1 bra 	$L__BB0_1;\n",
                BARRIER,
                "$L__BB0_1:\n",
            ),
            "not all threads are here",
        ),
        (
            ("\tsetp.lt.s32 	%p1, %r1, 9;\n", "\t@%p1 match.any.sync.b32 	%r4, %r1, -1;\n"),
            "not the whole warp is here",
        ),
        (("\tmov.b32 	%r5, 0;\n", "\tdiv.u32 	%r4, %r1, %r5;\n"), "division by"),
    ],
    ids=[
        "no-wait",
        "read-race",
        "uninitialized",
        "write-after-read",
        "unset-register",
        "write-race",
        "out-of-bounds",
        "misaligned",
        "divergent-barrier",
        "part-of-a-warp",
        "division",
    ],
)
def test_ptx_machine_raises(body: tuple[str, ...], message: str) -> None:
    with pytest.raises((AssertionError, ValueError), match=message):
        run(*body)
