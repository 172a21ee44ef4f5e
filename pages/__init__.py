"""HTTP that is only to be looked at: status pages, metrics, health.

What those of the node's agent, of endpoints and of warm pools have in common: `guard` (who may ask, and what
a browser is told), `middleware` (the same for aiohttp), `loopthread` (where aiohttp runs). Imports nothing
of ours.
"""
