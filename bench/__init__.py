"""Benchmarks, reports and the demo."""

from taskmoe.kernels import __version__ as __version__
