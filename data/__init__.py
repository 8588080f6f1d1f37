"""Ground floor: taxonomy, examples, tokenizer and the input pipeline. Imports nothing above it."""
