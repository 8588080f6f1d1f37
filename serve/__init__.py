"""Turbine, the gRPC service and its client. Imports `model` and `data`, never `train`."""
