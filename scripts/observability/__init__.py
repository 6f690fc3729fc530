"""What people watch servers and the operator with: alerts, a page for each, and a dashboard, all from here.

Queries name metrics by the objects of :mod:`unmask.telemetry.metrics`, so that none is asked for that is not
exported; a test compares those of the operator with its table. Where a query has ``$of``, the series of one
release belong: the chart puts its namespace and service there, a dashboard what is chosen in it. ``$gateway``
and ``$operator`` are the same for gateways and operators.
"""
