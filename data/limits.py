"""The limits of a text, for training and serving. Imports nothing, for the light processes that check them."""

# Characters of a text. A longer one is refused, not cut: it is nearly always a file that was read as one text.
MAX_TEXT_CHARS = 1_000_000
