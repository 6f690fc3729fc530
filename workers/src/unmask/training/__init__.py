"""Training: data, packing, stages, optimiser, checkpoints and evaluation behind ``unmask train``.

The way of a document: :mod:`records` reads it, :mod:`encoding` makes tokens of it,
:mod:`corpus` keeps them, :mod:`stream` puts the documents in order, :mod:`packing` lays
them into rows. The way of a step: :mod:`plan` says which stage, block size and learning
rate it has, :mod:`steps` computes the gradient, :mod:`optimizer` applies it,
:mod:`trainer` decides what follows: a measurement, a checkpoint, the next stage, the end.

What every module keeps to: order, packing and noise are functions of the job's seed and
of the step alone. So a run that is killed and started again, on as many or other ranks,
sees the same documents under the same masks.
"""
