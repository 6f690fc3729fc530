"""Answers generation requests: an engine of one model thread, and gRPC in front of it."""
