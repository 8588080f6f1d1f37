"""Exports: a bundle's classifier for other runtimes, checked in the runtime before anybody sees it.

`formats` lists the formats; each has a module `to_…` that writes and loads it. `folder` is what all exports share:
manifest, labels, tokenizer, golden answers. `run` writes, checks and renames; `commands` is the command line.
"""
