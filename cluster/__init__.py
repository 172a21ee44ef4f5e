"""The Kubernetes API for those who write to it: objects, conflicts, leadership.

`api.Api` is the one door; `watching.Watcher` keeps a collection current; `leader.Leader` holds a Lease. What
is pure (`objects`, `lease`) knows no HTTP.
"""
