"""Qwen3, dense, and SDAR: the same body as a block-diffusion model."""
