"""Mixture-of-Experts ops: gating, row movement and grouped matmuls, with gradients."""
