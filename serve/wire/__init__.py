"""Errors, limits and statuses: what both ends of a connection share."""
