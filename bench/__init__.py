"""Benchmarks, reports and the demo."""

from taskmoe.kernels import __version__

__all__ = ["__version__"]
