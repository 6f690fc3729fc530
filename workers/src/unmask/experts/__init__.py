"""Routed experts in processes of their own: where they are, what is sent, who answers when one does not.

An engine keeps attention, routers, dense and shared weights, and sends token rows to shards that hold the
experts. The way of a token's row through here::

    mixture     a layer's routing -> rows for each part -> ... -> sums added in the order of the parts
    exchange    one layer's frames: sent, waited for, sent again where failover says so
    frames      rows, experts and weights as bytes, and back
    links       the way to one shard and back
    shard       takes frames, answers with sums
    holding     the experts that a shard has, and what they make of rows

``placement`` and ``failover`` hold decisions alone. ``planning`` computes beforehand what all of it takes.
"""
