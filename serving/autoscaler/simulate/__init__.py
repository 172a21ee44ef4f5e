"""The simulator that autoscaling policies are judged by: every request of an endpoint, second by second.

`traffic` with `tracefiles` (who asks when, for how much work), `fleet`, `kernel`, `heap` and `routing`
(replicas that serve it: compiled), `run` (one policy against one traffic), `policies` with `hpa` and
`knative` (who is compared), `scenarios`, `sweep` and `judgement` (what is compared, and how), `plots` and
`page` with `table` (what is shown). Called by `glowplug autoscale simulate`. Nothing that serves imports it:
its libraries are in the extra `simulate`.
"""
