"""Qwen3 with experts, and SDAR-MoE: the same body as a block-diffusion model."""
