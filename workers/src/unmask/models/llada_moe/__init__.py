"""LLaDA-MoE: trained from scratch with full-sequence diffusion (arXiv 2509.24389)."""
