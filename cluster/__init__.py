"""The Kubernetes API: objects, conflicts, leadership, collections kept current.

`api.Api` is the one door; `watching.Watcher` keeps a collection current; `leader.Leader` holds a Lease. What
is pure (`objects`, `lease`) knows no HTTP.
"""
