"""FP8 checkpoints: made shard by shard with llm-compressor, and compared with what they were made from.

Pure: `tensors` (what a checkpoint holds, by its safetensors headers), `choice` (which layers become FP8),
`verdict` (whether the result is good enough). `runner.py` is a script for another interpreter, the one that
has llm-compressor: its pins and vLLM's contradict one another. `job` runs it.
"""
