"""Serving: the engine (Turbine), the gRPC service, its client and the HTTP gateway. Never imports `train`.

Imports run one way: proto ← wire ← ops ← core, client, gateway ← rpc.
"""
