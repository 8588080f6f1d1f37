"""What a server accepts, and what its client keeps to. Light, so that both may import it."""

# What one RPC may carry, in bytes. Well above the longest text (4 MB of UTF-8), so that a text beyond that limit still
# reaches the check that can say so; and what bounds the memory of one request.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
# Calls that may wait in gRPC, not yet read; gRPC's own bound.
MAX_PENDING_CALLS = 1000
# What is refused because of what is in flight, or waits to be, may be tried again after about so long.
RETRY_SECONDS = 0.1
# Texts of one ClassifyBatch.
MAX_TEXTS = 1024
# What `top_k = 0` means.
DEFAULT_TOP_K = 5
# Characters of a request id.
MAX_REQUEST_ID = 128
