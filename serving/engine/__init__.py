"""`glowplug engine`: a model server as a supervised child, behind one port.

This package is imported by two interpreters: ours (the supervisor), and the engine's own, whose API server
processes carry `gate`. What `gate` imports (`ledger`, `limiter`, `admission`) therefore needs nothing but
Python's library, and this file imports nothing at all.
"""
