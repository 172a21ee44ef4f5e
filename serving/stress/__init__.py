"""The stress test of an endpoint before production: a ramp of open-loop load until an objective breaks.

Pure: `arrivals` (when which request is sent), `judgement` (what a step was like, and what follows). `load`
sends; `ramp` goes from step to step. Called by `glowplug endpoint stress`.
"""
