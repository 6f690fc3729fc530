"""Where the time of a forward goes if experts are in shards, computed before anything is started.

:mod:`choices` says how many experts and parts the tokens of a forward hit, :mod:`constants` what machines,
transports and networks take for bytes and products, :mod:`forward` puts them together, and :mod:`report`
makes tables of it. All are pure functions of a model's shape and of constants, each of which knows where it
comes from. No weights are read, and no torch is needed.
"""
