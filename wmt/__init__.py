"""Reference multilingual translation system built on `taskmoe.moe`."""

from taskmoe.kernels import __version__

__all__ = ["__version__"]
