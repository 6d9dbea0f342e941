"""Quantize the experts of a float checkpoint: ``python examples/quantize_checkpoint.py SRC DST``.

Weight-only; ``python -m nvfp4_ops quantize --help`` tells how to calibrate static input scales.
"""

import sys

import nvfp4_ops


def main(source: str, destination: str) -> None:
    nvfp4_ops.quantize_checkpoint(source, destination, progress=True)
    for experts in nvfp4_ops.inspect_checkpoint(destination).experts:
        print(f"{experts.prefix}: {experts.num_experts} experts, {experts.scheme}")


if __name__ == "__main__":
    main(*sys.argv[1:])
