"""Benchmarks. Not part of the wheel."""
