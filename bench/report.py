"""How a benchmark reports: command, GPU and versions, a line a case, JSON, and a plot of some."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import nvfp4_ops
from bench.plots import write_plot


def parse_out(description: str) -> Path:
    """The only option of a benchmark, ``--out DIR``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    out: Path = parser.parse_args().out
    return out


def command(name: str, arguments: Sequence[str]) -> str:
    """What was run, but for where its results go.

    >>> command("moe", ["--out", "/tmp", "--shape", "qwen3-30b-a3b"])
    'python -m bench.moe --shape qwen3-30b-a3b'
    """
    kept = list(arguments)
    while "--out" in kept:
        place = kept.index("--out")
        del kept[place : place + 2]
    return " ".join(["python -m", f"bench.{name}", *kept])


class Report:
    """Prints as it goes; ``write`` saves NAME.txt, NAME.json, and NAME.png if it has a plot."""

    def __init__(self, name: str, facts: dict[str, Any], columns: str) -> None:
        self.name = name
        self.header = {
            "command": command(name, sys.argv[1:]),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            "torch": torch.__version__,
            "nvfp4_ops": nvfp4_ops.__version__,
            **facts,
        }
        self.results: list[Any] = []
        self.lines: list[str] = []
        for key, value in self.header.items():
            self._print(f"{key}: {value}")
        self._print(columns)

    def _print(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)

    def add(self, result: Any, line: str) -> None:
        """A dataclass for the JSON, and its line."""
        self.results.append(result)
        self._print(line)

    def write(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        document = self.header | {"results": [asdict(result) for result in self.results]}
        (out / f"{self.name}.json").write_text(json.dumps(document, indent=1) + "\n")
        (out / f"{self.name}.txt").write_text("\n".join(self.lines) + "\n")
        write_plot(document, self.name, out)
