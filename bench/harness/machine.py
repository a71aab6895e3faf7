"""The machine and the versions that a measurement was made with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "libtpu", "numpy")
GPU_PACKAGES = ("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
GPU_PEERS = ("tokamax", "torch")


def describe() -> dict[str, str]:
    """CPU model, cores, GPU where there is one, OS, Python, library versions, and the commit."""
    gpu = _gpu()
    facts = {
        "cpu": _cpu_model(),
        "cores": str(cores()),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    for name in (*PACKAGES, *((*GPU_PACKAGES, *GPU_PEERS) if gpu else ())):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts | gpu | {"commit": _commit() or "of no checkout"}


def _gpu() -> dict[str, str]:
    """Name and driver of the first NVIDIA GPU."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    name, _, driver = done.stdout.strip().partition(", ")
    return {"gpu": name, "driver": driver}


def cpu_details() -> str:
    """What tells CPUs of one name apart: family, model, stepping, cache and cores."""
    wanted = ("cpu family", "model", "stepping", "cache size")
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        lines = []
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    told = {name.strip(): value.strip() for name, value in pairs}
    words = [f"{name} {told[name]}" for name in wanted if name in told]
    return ", ".join([*words, f"{cores()} cores"])


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that this file lies in, marked if sources were changed."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
