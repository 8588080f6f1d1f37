"""Turbine, the inference engine, and what makes a classifier of it. No gRPC.

Turbine is `engine` (the compiled programs of a model, and the choice among them), `queues` and `scheduler` (which forms
batches and feeds the device) and `deadlines`. `models` loads and swaps models, `tokenizing` makes token ids of texts,
`answers` responses of logits, and `pipeline` takes a request through all of them.
"""
