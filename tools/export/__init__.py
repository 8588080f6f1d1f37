"""Exports of a bundle's classifier to other runtimes. Each export is verified in its runtime before it is published.

`formats` lists the formats; each has a module `to_…` that writes and loads it. `folder` holds the files that all
formats share: manifest, labels, tokenizer and golden answers. `run` writes, verifies and renames an export.
"""
