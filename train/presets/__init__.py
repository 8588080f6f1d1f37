"""Presets: Python files whose docstring says what they train, on what, how long it took and what score it reached."""
