"""The wire format: classifier.proto and what `generate.py` made of it."""
