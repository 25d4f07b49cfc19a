"""What the figures were made on: the machine and the versions. Knows nothing of what is measured."""

import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("recursivemas", "torch", "transformers")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads, load at the start, GPU, and versions, as plain data."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 1)
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpu_memory_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
        found["cuda"] = torch.version.cuda
    return found


def in_words(machine: dict[str, Any]) -> str:
    """The same in one line."""
    where = machine.get("gpu") or f"{machine['cores']} cores ({machine['processor']})"
    load = f", load {machine['load']} at the start" if "load" in machine else ""
    versions = ", ".join(f"{name} {machine[name]}" for name in LIBRARIES)
    return f"{where}, {machine['threads']} thread(s){load}; Python {machine['python']}, {versions}"


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that was allocated since the last reset, on a CPU the most the process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
