"""Losses, the step, the trainer, checkpoints, calibration and evaluation. Imports `model` and `data`."""
