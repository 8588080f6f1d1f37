"""`classer predict`: a file of texts in, the same file with predictions out, at any size."""
