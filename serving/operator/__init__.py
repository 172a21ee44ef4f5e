"""Endpoints as custom resources: `glowplug operator run` in a cluster's namespace.

`definition` is the resource's schema, `resource` what one says and shows, `tending` the loop of one endpoint,
`process` the whole: lease, router, kopf. The decisions are those of `glowplug serve` (`serving.controller`,
`serving.autoscaler`); replicas are the kubernetes provider's.
"""
