"""One endpoint, served: the document, the engine, the router, the providers of replicas.

Imports nothing of agent, converter or imagefs: what it wants of them it asks by their commands and sockets.
"""
