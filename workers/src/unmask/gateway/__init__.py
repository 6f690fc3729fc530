"""A front for several servers of one model: it spreads calls, and goes on elsewhere when a server is lost.

::

    addresses   where replicas are: named one by one, or found by DNS
    routing     which of them a call goes to: decisions alone
    pool        their connections, what they say of themselves, what they have been given
    relay       one call, over as many replicas as it takes
    server      ports, health, metrics, and an orderly end

Clients are spoken to by ``unmask.fronts``, as an engine's are. It needs no torch and reads no model.
"""
