"""The node daemon: containerd starts containers from block images."""
