"""Reference multilingual translation system built on `taskmoe.moe`."""

from taskmoe.kernels import __version__ as __version__
