"""Llama and what follows its design, such as SmolLM2: dense, autoregressive or masked."""
