"""Turbine, the inference engine: compiled programs, queues, the scheduler that forms batches, and the request pipeline.

No gRPC here.
"""
