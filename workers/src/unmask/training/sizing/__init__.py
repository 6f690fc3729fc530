"""What a job needs before it is started: arithmetic, memory and hours, from configuration and manifest alone.

:mod:`unmask.models.shape` sums a model up in a few numbers, :mod:`work` says how many positions a step
computes, :mod:`flops` and :mod:`memory` what that costs, :mod:`devices` what a GPU offers, :mod:`estimate`
puts them together, and :mod:`remedies` looks for the smallest change that fits. All are pure functions; no
weights and no data are read.
"""
