"""Mixture-of-Experts ops: gating, row movement and grouped matmuls, with gradients.

Each op has several implementations: "mosaic" (Pallas kernels for TPU), "ragged_dot" (for GPU),
"xla" (fast anywhere) and "reference" (the definition). None leaves the choice to the platform that
is lowered for, see `taskmoe.kernels.platforms`; `for_chip` names a TPU that is not there.
"""

from taskmoe.kernels.expert_network import expert_ffn
from taskmoe.kernels.gating import Gating, given_gating, top_k_gating
from taskmoe.kernels.grouped_matmul import gmm, tgmm
from taskmoe.kernels.planning import RowPlan, row_plan
from taskmoe.kernels.platforms import for_chip
from taskmoe.kernels.quantized import Quantized, dequantize, quantize
from taskmoe.kernels.router import ROUTERS, Router
from taskmoe.kernels.row_movement import combine, dispatch
from taskmoe.kernels.tiling import Tiling

#: The only place of the version: setup.py reads it here, the other packages show it.
__version__ = "0.2.0"

__all__ = [
    "ROUTERS",
    "Gating",
    "Quantized",
    "Router",
    "RowPlan",
    "Tiling",
    "combine",
    "dequantize",
    "dispatch",
    "expert_ffn",
    "for_chip",
    "given_gating",
    "gmm",
    "quantize",
    "row_plan",
    "tgmm",
    "top_k_gating",
]
