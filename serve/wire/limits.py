"""Limits of requests, shared by server and clients. Imports nothing."""

# Bytes of one message. Above the longest text (4 MB of UTF-8), so that the check of a text's length can answer with a
# sentence; also the memory bound of one request.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
# Calls that wait in gRPC before they are read; gRPC enforces it.
MAX_PENDING_CALLS = 1000
# Seconds after which a call that was refused for lack of room may be tried again.
RETRY_SECONDS = 0.1
# Texts or requests of one ClassifyBatch.
MAX_TEXTS = 1024
# Labels to return where a request has no `top_k`.
DEFAULT_TOP_K = 5
# Characters of a request id.
MAX_REQUEST_ID = 128
# The address of a server that is not named: the default port of `classer serve` on this machine.
DEFAULT_SERVER = "localhost:50051"
