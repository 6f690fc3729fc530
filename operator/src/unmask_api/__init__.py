"""The custom resources as models: the one source of CRDs, defaults, reference pages and validation.

Imports pydantic and nothing else of the house, so that every program can read a manifest.
"""
