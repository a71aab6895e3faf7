"""The Mixture-of-Experts layer over `taskmoe.kernels`: routing, expert parallelism, extraction.

Pure functions on pytrees: `init` makes a layer's parameters, `apply` runs it, `extract` cuts one
task's sub-network out, and `ffn` runs that; `extract_tasks` and `prune` make smaller layers.
`balance_bias` balances experts without a loss, `quantize` freezes experts in 8 bits, `row_major`
says how parameters lie best, and `taskmoe.moe.convert` reads and writes checkpoints of models.
"""

from taskmoe.kernels import __version__ as __version__
from taskmoe.moe.balance import balance_bias
from taskmoe.moe.config import Metrics, MoEConfig
from taskmoe.moe.extraction import FFNParams, extract, extract_tasks, ffn, prune
from taskmoe.moe.formats import row_major
from taskmoe.moe.gates import Chosen
from taskmoe.moe.layer import apply
from taskmoe.moe.mesh import MeshAxes, param_specs
from taskmoe.moe.parameters import init
from taskmoe.moe.quantization import quantize
from taskmoe.moe.routers import sparse_mixer

__all__ = [
    "Chosen",
    "FFNParams",
    "MeshAxes",
    "Metrics",
    "MoEConfig",
    "apply",
    "balance_bias",
    "extract",
    "extract_tasks",
    "ffn",
    "init",
    "param_specs",
    "prune",
    "quantize",
    "row_major",
    "sparse_mixer",
]
