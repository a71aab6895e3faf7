"""Packaging: folder X is package `taskmoe.X`."""

from pathlib import Path

from setuptools import setup

CORE = ["jax>=0.10,<0.13", "jaxlib>=0.10,<0.13", "numpy>=2.0,<3"]
WMT = [
    "absl-py>=2.1,<3",
    "babel>=2.16,<3",
    "flatbuffers>=24.3,<26",  # jax.export writes with it
    "grain>=0.2.12,<0.3",
    "num2words>=0.5.13,<0.6",
    "optax>=0.2.5,<0.3",
    "orbax-checkpoint>=0.11.30,<0.13",
    "rich>=13.7,<16",
    "sacrebleu>=2.4.3,<3",
    "safetensors>=0.5,<0.9",
    "sentencepiece>=0.2.1,<0.3",
]
HF = ["datasets>=4.0,<6"]
TENSORBOARD = ["tensorboardX>=2.6.2,<3"]
BENCH = [*WMT, "matplotlib>=3.9,<4", "pytest>=8.3,<10", "pytest-benchmark>=5.1,<6"]
DEV = [
    *BENCH,
    *HF,
    *TENSORBOARD,
    "beartype>=0.20,<0.24",
    "equinox>=0.11,<0.14",
    "flax>=0.10,<0.13",
    "hypothesis>=6.120,<7",
    "jaxtyping>=0.3,<0.4",
    # The TPU compiler; its versions follow jax's.  make lock pins the one that matches.
    'jax[tpu]>=0.10,<0.13; sys_platform == "linux" and platform_machine == "x86_64"',
    "mypy>=1.15,<3",
    "pytest-xdist>=3.6,<4",
    "ruff>=0.12,<0.18",
]
PACKAGES = ["kernels", "moe", "wmt", "wmt.commands", "bench"]

setup(
    name="taskmoe",
    version="0.1.0",
    description="Fast Mixture-of-Experts for TPU in JAX and Pallas, with task-level routing",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[f"taskmoe.{name}" for name in PACKAGES],
    package_dir={f"taskmoe.{name}": name.replace(".", "/") for name in PACKAGES},
    package_data={f"taskmoe.{name}": ["py.typed"] for name in PACKAGES if "." not in name},
    install_requires=CORE,
    extras_require={
        "wmt": WMT,
        "hf": [*WMT, *HF],
        "tensorboard": [*WMT, *TENSORBOARD],
        "bench": BENCH,
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "dev": DEV,
    },
)
