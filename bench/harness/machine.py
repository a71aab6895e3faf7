"""The machine and the versions that a measurement was made with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "libtpu", "numpy")
GPU_PACKAGES = ("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
GPU_PEERS = ("tokamax", "torch")


def describe() -> dict[str, str]:
    """CPU model, cores, GPU where there is one, OS, Python, library versions, and the commit."""
    gpu = _gpu()
    facts = {
        "cpu": _cpu().get("model name") or platform.processor() or platform.machine(),
        "cores": str(cores()),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    for name in (*PACKAGES, *((*GPU_PACKAGES, *GPU_PEERS) if gpu else ())):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    # Of the checkout that this file lies in, marked if sources were changed.
    words = "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"
    commit = said_by("git", *words, cwd=Path(__file__).resolve().parent)
    return facts | gpu | {"commit": commit or "of no checkout"}


def _gpu() -> dict[str, str]:
    """Name and driver of the first NVIDIA GPU."""
    query = "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"
    said = said_by("nvidia-smi", *query)
    if said is None:
        return {}
    name, _, driver = said.partition(", ")
    return {"gpu": name, "driver": driver}


def said_by(*command: str, cwd: Path | None = None, seconds: float | None = 20) -> str | None:
    """What a command prints, or None where it fails, is not there, or takes longer."""
    options: Any = {"capture_output": True, "text": True, "check": True}
    try:
        return str(subprocess.run(command, cwd=cwd, timeout=seconds, **options).stdout.strip())
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_details() -> str:
    """What tells CPUs of one name apart: family, model, stepping, cache and cores."""
    told, wanted = _cpu(), ("cpu family", "model", "stepping", "cache size")
    words = [f"{name} {told[name]}" for name in wanted if name in told]
    return ", ".join([*words, f"{cores()} cores"])


def _cpu() -> dict[str, str]:
    """What Linux tells of the first core; elsewhere nothing."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
