"""What speaks gRPC and HTTP to clients, whatever it is that answers: an engine, or a gateway before several.

::

    grpc_port     a port with its limits, certificates and names that are let in
    generation    unmask.v1.Generation
    http_front    OpenAI-style HTTP
    openai_wire   its bodies
    generating    what answers has to offer, and how a call is accounted for
    refusals      why a call is refused, as a status that programs can act on
    unreadable    bytes that are no message
    process       how the process ends, and whether it turns

It needs no torch and knows no model.
"""
