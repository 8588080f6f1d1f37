"""The interface on the wire, `classifier.proto`, and the Python files that are generated from it."""
