"""Models that are not directories of this machine, brought to where an engine can open them.

`place` (pure) reads what a document's `model` says, `store` is the node's directory of models: what is there,
who uses it, what must go for the quota. `bucket` downloads from S3 into it, by the plan that `listing` (pure)
makes; `image` mounts block images into it, lazily, through the command. Called by the engine's supervisor
before vLLM is started (`serving.engine.kinds`), on a thread of its own.
"""
