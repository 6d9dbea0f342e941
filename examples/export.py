"""Export the trained model, save it, package it and run the package in a new process.

    python examples/export.py [DIRECTORY]

Two files come to lie in DIRECTORY (a temporary one by default): ``program.pt2``, a graph that
``torch.export.load`` gives back, and ``package.pt2``, machine code by AOTInductor. Both hold the
weights in 4 bits, in the layout of the device they were made on, and take any number of tokens.

The steps of experts and routing are ops whose kernels are in nvfp4_ops: whoever loads either file
imports nvfp4_ops first. The program computes the bits of eager mode, the package those of
``torch.compile``: where Inductor sums in another order, as in a norm, the last bits differ.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tiny_moe.quantized import load_quantized
from tiny_moe.tokenizer import load_tokenizer

CHECKPOINT = Path(__file__).parent / "checkpoint"
PROMPTS = ("class ", "def read_lines(path, encoding=None):\n    with open(path")

# All that a machine needs to run a package: torch, and nvfp4_ops for the ops.
RUN = """
import sys
import torch
import nvfp4_ops
package, inputs, outputs = sys.argv[1:]
run = torch._inductor.aoti_load_package(package)
torch.save([run(ids) for ids in torch.load(inputs)], outputs)
"""


def run_in_new_process(package: Path, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    files = [package.with_name(name) for name in ("inputs.pt", "outputs.pt")]
    torch.save(inputs, files[0])
    subprocess.run([sys.executable, "-c", RUN, package, *files], check=True)
    outputs: list[torch.Tensor] = torch.load(files[1])
    return outputs


@torch.no_grad()
def export(directory: Path) -> None:
    on_gpu = torch.cuda.is_available()
    # CPUs without bf16 matrix units are many times slower in bf16 than in fp32.
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    model = load_quantized(CHECKPOINT, dtype=dtype, device=device, activation_scale="per_token")
    tokenizer = load_tokenizer(CHECKPOINT)
    inputs = [torch.tensor([tokenizer.encode(prompt).ids], device=device) for prompt in PROMPTS]
    expected = [model(ids) for ids in inputs]

    # At least two tokens: export would fix a size of 0 or 1, which may mean something special.
    example = torch.zeros(1, 8, dtype=torch.int64, device=device)
    dynamic = ({1: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (example,), dynamic_shapes=dynamic)
    torch.export.save(program, directory / "program.pt2")
    loaded = torch.export.load(directory / "program.pt2").module()
    same = all(torch.equal(loaded(i), e) for i, e in zip(inputs, expected, strict=True))
    print(f"program.pt2: {'the bits' if same else 'NOT the bits'} of eager mode")

    started = time.perf_counter()
    package = directory / "package.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(package))
    print(f"package.pt2: compiled in {time.perf_counter() - started:.0f} s")
    for prompt, logits, eager in zip(
        PROMPTS, run_in_new_process(package, inputs), expected, strict=True
    ):
        difference = (logits - eager).abs().max() / eager.abs().max()
        token, wanted = (int(x[0, -1].argmax()) for x in (logits, eager))
        print(
            f"  {tokenizer.decode([token])!r} follows {prompt!r} in a new process, "
            f"{tokenizer.decode([wanted])!r} in this one; logits differ by {difference:.1g}"
        )


def main(directory: str | Path | None = None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(directory or temporary)
        # Before the model is traced, not after.
        target.mkdir(parents=True, exist_ok=True)
        export(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
