"""Errors, limits, statuses and enum words, shared by server and client."""
