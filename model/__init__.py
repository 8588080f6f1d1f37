"""The network: config, encoder, heads, quantisation, bundles. Imports `data` only."""
