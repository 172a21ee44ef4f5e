"""The activator: a process of its own that holds requests while no replica is up, and says how many.

It stands in the endpoints of every service that may be at zero, at priority 1, so that Envoy sends it
requests exactly while no replica is healthy: there is nothing to switch, and nothing to be late with. Pure:
`hold` (who waits) and `choice` (where a released request goes). Adapters: `control` (endpoints come over xDS,
load goes over LRS) and `proxy` (HTTP). `process` owns them.
"""
