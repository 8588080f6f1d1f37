"""Losses, the step, the loop, checkpoints, calibration and evaluation. Imports `model` and `data`."""
