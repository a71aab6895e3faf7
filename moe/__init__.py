"""The Mixture-of-Experts layer over `taskmoe.kernels`: routing, expert parallelism, extraction.

Pure functions on pytrees: `init` makes a layer's parameters, `apply` runs it, `extract` cuts one
task's sub-network out, and `ffn` runs that.
"""

from taskmoe.moe.config import Metrics, MoEConfig
from taskmoe.moe.expert_parallel import param_specs
from taskmoe.moe.extraction import FFNParams, extract, ffn
from taskmoe.moe.layer import apply, init

__all__ = ["FFNParams", "Metrics", "MoEConfig", "apply", "extract", "ffn", "init", "param_specs"]
