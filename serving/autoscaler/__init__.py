"""The autoscaler of an endpoint: how many replicas, and how many requests each may take."""
