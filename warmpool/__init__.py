"""The warm pool: GPU nodes that are booted, with the right images cached, before they are asked for."""
