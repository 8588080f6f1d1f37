"""Ahead-of-time compilation for accelerators that are not attached: memory, collectives and step time."""
