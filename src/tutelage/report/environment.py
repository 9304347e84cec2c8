# SPDX-License-Identifier: Apache-2.0
"""What a run ran on, without naming the machine or its user."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def environment() -> dict[str, str]:
    """Return versions, threads and processors by name; no host name, user, address or path."""
    found = {
        "tutelage": _version("tutelage"),
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        found["accelerator"] = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
        found["CUDA"] = str(torch.version.cuda)
    return found


def processor(source: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's model, or its architecture where the system does not tell.

    Args:
        source: where Linux tells it.
    """
    try:
        lines = source.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), "") or platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
