"""Settings that must stand before JAX starts: eight CPU devices, and no search for a TPU.

Most of the tests' time goes into compiling small programs that run once. So XLA is told to optimise
them less and to emit simpler code, and a program that was compiled before, in another test or by a
command that a test starts, is taken from a cache that lasts as long as the run. With
TASKMOE_AS_SHIPPED=1 XLA's settings are left alone: `make test-shipped` tests the numerics so, and
`make test` those of them that are marked `as_shipped`.
"""

import atexit
import gc
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
wanted = ["--xla_force_host_platform_device_count=8"]
if os.environ.get("TASKMOE_AS_SHIPPED", "0") in ("", "0"):
    wanted += ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    wanted += ["--xla_cpu_parallel_codegen_split_count=1"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        wanted += ["--xla_cpu_use_fusion_emitters=false"]  # later versions may not know it
flags = os.environ.get("XLA_FLAGS", "")
for flag in wanted:
    if flag.partition("=")[0] not in flags:
        flags = f"{flags} {flag}".strip()
os.environ["XLA_FLAGS"] = flags

# One cache for each process that runs tests: JAX writes into it without a lock.
_PROGRAMS = tempfile.mkdtemp(prefix="taskmoe-programs-")
atexit.register(shutil.rmtree, _PROGRAMS, ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax  # noqa: E402  the settings above stand now

# A kernel that is interpreted computes in callbacks. While it runs in the background, they and what
# a test does next were seen to wait for each other for good, on two busy cores.
jax.config.update("jax_cpu_enable_async_dispatch", False)

_CPUS_FILE = Path("/sys/devices/system/cpu/possible")
_MAPS = Path("/proc/self/maps")
_MANY_MAPPINGS = 15_000


def pytest_configure() -> None:
    """Say what is wrong where libtpu would abort the tests: in a chroot without /sys."""
    if importlib.util.find_spec("libtpu") is not None and not _CPUS_FILE.exists():
        raise pytest.UsageError(f"libtpu cannot be loaded without {_CPUS_FILE}: mount /sys")


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Let compiled programs go before they are too many.

    Each takes several memory mappings, of which Linux gives a process 65,530 (vm.max_map_count):
    a process that had compiled for hundreds of tests was seen to crash in XLA, probably by that.
    """
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()
