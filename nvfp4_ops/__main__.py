"""``python -m nvfp4_ops info | inspect DIR | quantize SRC DST``."""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

import nvfp4_ops
from nvfp4_ops.checkpoint.inspect import CheckpointReport, Range, inspect_checkpoint
from nvfp4_ops.checkpoint.quantize import EXPERTS_ONLY, quantize_checkpoint, write_json

MAX_PROBLEMS = 20
"""Shown below the table."""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def info() -> None:
    print(f"nvfp4_ops {nvfp4_ops.__version__}")
    print(f"python {platform.python_version()}, torch {torch.__version__}")
    print(f"nvidia-cutlass-dsl {_version('nvidia-cutlass-dsl')}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            print(f"cuda:{index} {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    else:
        print("no CUDA device")
    backends = nvfp4_ops.backend_info()
    width = max(map(len, backends))
    for op, by_device in backends.items():
        served = ", ".join(f"{device}: {kernel}" for device, kernel in by_device.items())
        print(f"  {op:<{width}}  {served}")


def _range(scales: Range | None) -> str:
    return "-" if scales is None else "..".join(f"{scale:.1e}" for scale in scales)


def print_report(report: CheckpointReport) -> None:
    """A table of the layers' experts, then every problem."""
    from rich.console import Console
    from rich.table import Table

    title = f"{report.directory} ({report.producer or 'not readable'})"
    table = Table("experts", title=title, title_justify="left")
    for column in ("scheme", "E x D x F", "weight scales", "input scales"):
        table.add_column(column, no_wrap=True)
    for column in ("gate != up", "at 448", "refused"):
        table.add_column(column, no_wrap=True, justify="right")
    for experts in report.experts:
        mismatch = f"{experts.num_mismatched} (x{experts.max_mismatch:.3g})"
        table.add_row(
            experts.prefix,
            experts.scheme or "-",
            f"{experts.num_experts} x {experts.hidden_size} x {experts.intermediate_size}",
            _range(experts.global_scales),
            _range(experts.input_scales),
            mismatch if experts.num_mismatched else "0",
            f"{experts.saturated:.2%}",
            str(len(experts.problems)),
        )
    # In a file or a pipe nobody sees the width: let no column be cut.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for scheme, number in report.linear_layers.items():
        console.print(f"{number} other linear layers: {scheme}")
    problems = report.all_problems()
    for problem in problems[:MAX_PROBLEMS]:
        console.print(f"refused: {problem}", markup=False, highlight=False, soft_wrap=True)
    if len(problems) > MAX_PROBLEMS:
        console.print(f"and {len(problems) - MAX_PROBLEMS} more; --json has them all")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nvfp4_ops")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices and which kernel serves which op")
    inspect = commands.add_parser("inspect", help="the experts of an NVFP4 checkpoint")
    inspect.add_argument("directory", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON, not a table")
    quantize = commands.add_parser("quantize", help="a float checkpoint to NVFP4 (ModelOpt layout)")
    quantize.add_argument("source", type=Path)
    quantize.add_argument("destination", type=Path)
    quantize.add_argument(
        "--include",
        nargs="+",
        default=EXPERTS_ONLY,
        metavar="WILDCARD",
        help="names of the linear modules to quantize (default: %(default)s)",
    )
    scales = quantize.add_mutually_exclusive_group()
    scales.add_argument(
        "--calibrate",
        type=Path,
        metavar="TEXT",
        help="run the model on this file, a text a line, for static input scales",
    )
    scales.add_argument(
        "--input-amax",
        type=Path,
        metavar="JSON",
        help="{module: largest magnitude of its input}, for static input scales",
    )
    quantize.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    return parser


def _amax_file(destination: Path) -> Path:
    """Where calibrated values are until the destination is complete."""
    return destination.with_name(f"{destination.name}.input_amax.json")


def _input_amax(args: argparse.Namespace) -> dict[str, float] | None:
    amax: dict[str, float]
    if args.input_amax:
        amax = json.loads(args.input_amax.read_text(encoding="utf-8"))
        return amax
    if not args.calibrate:
        return None
    # An interrupted run goes on only with the very same values.
    cache = _amax_file(args.destination)
    text = args.calibrate.read_text(encoding="utf-8")
    key = [str(args.source.resolve()), sha256(text.encode()).hexdigest()]
    if cache.exists():
        stored = json.loads(cache.read_text(encoding="utf-8"))
        if stored["key"] == key:
            amax = stored["input_amax"]
            return amax
    from nvfp4_ops.huggingface import calibrate_checkpoint

    amax = calibrate_checkpoint(args.source, filter(None, text.splitlines()), device=args.device)
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_json(cache, {"key": key, "input_amax": amax})
    return amax


def _run(args: argparse.Namespace) -> int:
    if args.command == "info":
        info()
        return 0
    # A bar is for people: none where the output goes to a file.
    progress = sys.stderr.isatty() and find_spec("tqdm") is not None
    if args.command == "inspect":
        report = inspect_checkpoint(args.directory, progress=progress)
        if args.json:
            print(json.dumps(asdict(report), indent=2))
        else:
            print_report(report)
        return 1 if report.all_problems() else 0
    if args.destination.exists():
        raise ValueError(f"destination: {args.destination} exists already")
    quantize_checkpoint(
        args.source,
        args.destination,
        include=args.include,
        input_amax=_input_amax(args),
        device=args.device,
        progress=progress,
    )
    _amax_file(args.destination).unlink(missing_ok=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 1 if a checkpoint is refused."""
    try:
        return _run(_parser().parse_args(arguments))
    except ImportError as error:
        print(f"{error}: pip install 'nvfp4-ops[cli,hf]'", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
