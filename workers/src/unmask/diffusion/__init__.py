"""Masked diffusion over tokens: noise, layouts, losses, the block schedule, decoding. Maths only.

The way of a training row through this package::

    PackedRows --noise.corrupt--> Corruption --layout.*--> ModelInputs --losses--> a scalar

and of a prompt: :mod:`~unmask.diffusion.generation`, block by block.
Nothing here does I/O, starts threads, or knows a model beyond its two calls
``hidden`` and ``logits``.
"""
