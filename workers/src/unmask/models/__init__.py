"""Model families, one folder each with the same three files: ``config``, ``model``, ``weights``.

:mod:`~unmask.models.registry` finds the family of a ``config.json`` by its
``architectures`` and needs no torch; :mod:`~unmask.models.loading` builds, loads and
saves models. On disk a model always has its family's published tensor names; in memory
a family arranges its parameters as it computes best (all experts of a layer are one
tensor).
"""
