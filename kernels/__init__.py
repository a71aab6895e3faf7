"""Mixture-of-Experts ops: gating, row movement and grouped matmuls, with gradients.

Each op has three implementations: "mosaic" (Pallas kernels for TPU), "xla" (fast anywhere) and
"reference" (the definition); None chooses mosaic on TPU and xla elsewhere.
"""

from taskmoe.kernels.expert_network import expert_ffn
from taskmoe.kernels.gating import Gating, top_k_gating
from taskmoe.kernels.grouped_matmul import gmm, tgmm
from taskmoe.kernels.planning import RowPlan, row_plan
from taskmoe.kernels.row_movement import combine, dispatch

#: The only place of the version: setup.py reads it here, the other packages show it.
__version__ = "0.2.0"

__all__ = [
    "Gating",
    "RowPlan",
    "combine",
    "dispatch",
    "expert_ffn",
    "gmm",
    "row_plan",
    "tgmm",
    "top_k_gating",
]
