"""What people watch a server with: alerts, a page for each, and a dashboard, all written from here.

Queries name metrics by the objects of :mod:`unmask.telemetry.metrics`, so that none is asked for that is not
exported. Where a query has ``$of``, the series of one release belong: the chart puts its namespace and
service there, a dashboard what is chosen in it.
"""
