"""Packaging: folder X is package `taskmoe.X`."""

import re
from pathlib import Path

from setuptools import setup

# Read, not imported: jax need not be there to build.
INIT = Path("kernels/__init__.py").read_text(encoding="utf-8")
VERSION = re.findall(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[0]

CORE = ["jax>=0.10,<0.13", "jaxlib>=0.10,<0.13", "numpy>=2.0,<3"]
WMT = [
    "absl-py>=2.1,<3",
    "babel>=2.16,<3",
    "flatbuffers>=24.3,<26",  # jax.export writes with it
    "grain>=0.2.12,<0.3",
    "num2words>=0.5.13,<0.6",
    "optax>=0.2.5,<0.3",
    "orbax-checkpoint>=0.11.30,<0.13",
    "protobuf>=5,<8",
    "rich>=13.7,<16",
    "sacrebleu>=2.4.3,<3",
    "safetensors>=0.5,<0.9",
    "sentencepiece>=0.2.1,<0.3",
]
HF = ["datasets>=4.0,<6"]
CTRANSLATE2 = ["ctranslate2>=4.6,<5"]
TENSORBOARD = ["tensorboardX>=2.6.2,<3"]
BENCH = [*WMT, "matplotlib>=3.9,<4", "pytest>=8.3,<10", "pytest-benchmark>=5.1,<6"]
DEV = [
    *BENCH,
    *HF,
    *TENSORBOARD,
    *CTRANSLATE2,
    "build>=1.2,<2",
    "equinox>=0.11,<0.14",
    "flax>=0.10,<0.13",
    "hypothesis>=6.120,<7",
    # The TPU compiler; its versions follow jax's.  make lock pins the one that matches.
    'jax[tpu]>=0.10,<0.13; sys_platform == "linux" and platform_machine == "x86_64"',
    "mypy>=1.15,<3",
    "pytest-xdist>=3.6,<4",
    "pyyaml>=6,<7",
    "ruff>=0.12,<0.18",
    "sacrebleu[ja]",
    "setuptools>=77",  # builds without a network; a venv has an older one or none
]
PARITY = ["torch>=2.6,<3", "transformers>=5.24,<6"]  # layers of models, beside their own modules
DOCS = [
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.6,<10",
    "mkdocstrings[python]>=1.0,<2",
    "ruff>=0.12,<0.18",  # wraps signatures
]
PACKAGES = [
    *("kernels", "moe", "cli"),
    *("wmt", "wmt.text", "wmt.model", "wmt.training", "wmt.commands"),
    *("bench", "bench.harness", "bench.ops", "bench.exchange", "bench.gate"),
    *("bench.serving", "bench.serving.decode", "bench.serving.beam", "bench.serving.task"),
    "bench.serving.serve",
    *("bench.tpu", "bench.tpu.kernels", "bench.tpu.model", "bench.tpu.published"),
    *(
        "bench.story",
        "bench.story.ablation",
        "bench.story.demo",
        "bench.story.study",
        "bench.training",
        "bench.tune",
        "bench.text",
    ),
]
DATA = {f"taskmoe.{name}": ["py.typed"] for name in PACKAGES if "." not in name}
DATA["taskmoe.bench.gate"] = ["baseline/*.json"]  # bench/results is the checkout's alone

setup(
    name="taskmoe",
    version=VERSION,
    description="Fast Mixture-of-Experts for TPU in JAX and Pallas, with task-level routing",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The taskmoe developers",
    license_expression="Apache-2.0",
    keywords=["jax", "pallas", "tpu", "mixture-of-experts", "moe", "machine-translation"],
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(11, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2110.03742"},
    python_requires=">=3.11",
    packages=[f"taskmoe.{name}" for name in PACKAGES],
    package_dir={f"taskmoe.{name}": name.replace(".", "/") for name in PACKAGES},
    package_data=DATA,
    entry_points={
        "console_scripts": [
            "taskmoe-wmt = taskmoe.wmt.__main__:main",
            "taskmoe-bench = taskmoe.bench.__main__:main",
        ]
    },
    install_requires=CORE,
    extras_require={
        "wmt": WMT,
        "hf": [*WMT, *HF],
        "ctranslate2": [*WMT, *CTRANSLATE2],
        "tensorboard": [*WMT, *TENSORBOARD],
        "bench": BENCH,
        "gpu": ["absl-py>=2.1,<3", "tokamax>=0.0.12,<0.1"],
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "parity": PARITY,
        "docs": DOCS,
        "dev": DEV,
    },
)
