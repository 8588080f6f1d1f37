"""The gRPC services, the server, and the front-end processes before it."""
