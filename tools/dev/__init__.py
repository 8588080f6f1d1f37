"""Scripts for the people who develop Classer. Not part of the wheel."""
