"""HTTP gateway: JSON over HTTP in front of a gRPC server."""
