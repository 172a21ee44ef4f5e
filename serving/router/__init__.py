"""The router: Envoy moves the bytes, this package tells every Envoy what to route where, and hears its load.

Pure: `resources` (services to Envoy's resources), `weights` (localities), `versions` (what each Envoy has).
Adapters: `ads` and `lrs` (gRPC), `envoy` (a process), `sources` (files, Kubernetes). `control.Router`
owns them.
"""
