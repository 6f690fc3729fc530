"""Training whose parameters, gradients and optimiser state are shared out over processes.

``plan`` says how many processes do what and refuses what does not fit; ``experts``
sends tokens to the processes that hold their experts; ``weights`` puts FSDP2 around the
layers and is what the trainer holds in place of replicated weights; ``recomputation``
trades memory for a second forward, with or without sharding.
"""
