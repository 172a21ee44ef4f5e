"""The Kubernetes API for those who write to it: objects, conflicts, leadership."""
