"""Real-world runs: demo, start-up benchmark. They drive the command, they are not imported."""
