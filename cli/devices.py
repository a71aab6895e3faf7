"""Which devices a command uses: what is there, without asking for a TPU that is not."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def use_present_devices() -> None:
    """Keep JAX from starting a TPU runtime on a machine without TPU.

    With libtpu installed (its compiler is useful anywhere) JAX tries to start it, and where no
    TPU is found that prints pages of warnings. Call this before the first use of a device. What
    the environment variable JAX_PLATFORMS says goes first.
    """
    names = ("accel0", "vfio/0", "nvidia0")  # TPU, newer TPU, NVIDIA GPU
    if "JAX_PLATFORMS" not in os.environ and not any((Path("/dev") / n).exists() for n in names):
        jax.config.update("jax_platforms", "cpu")
