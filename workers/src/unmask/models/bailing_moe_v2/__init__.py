"""Ling 2.0 (BailingMoeV2): the autoregressive source of LLaDA2.0, with the same body."""
