"""Watches, work queue, lease and writes: the only part of the operator that talks to the API server."""
