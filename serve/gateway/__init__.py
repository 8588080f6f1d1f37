"""The HTTP gateway: JSON over HTTP in front of the gRPC service."""
