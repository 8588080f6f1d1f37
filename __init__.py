"""Classer: a self-hosted system for one job, text classification."""

__version__ = "0.1.0"
