"""Masked-diffusion language models: train them, serve them, ask them. Importing this needs no torch."""
