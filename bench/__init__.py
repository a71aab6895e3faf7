"""Benchmarks, reports and the demo."""
