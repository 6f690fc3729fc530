"""OLMoE, autoregressive or masked."""
