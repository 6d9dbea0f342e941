"""``python -m nvfp4_ops info``: versions, devices and which kernel serves which op."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import nvfp4_ops


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nvfp4_ops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices and which kernel serves which op")
    parser.parse_args()
    info()


if __name__ == "__main__":
    main()
