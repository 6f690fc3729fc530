"""LLaDA2.0: mixture of experts with group-limited sigmoid routing, block diffusion (arXiv 2512.15745)."""
