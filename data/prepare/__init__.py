"""Preparation at scale: raw labelled text in, tokenised training shards and a manifest out.

`steps`, `minhash` and `contamination` are pure functions of rows; `local` runs them in this process and `on_beam` on
Apache Beam, to the same bytes.
"""
