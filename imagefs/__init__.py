"""The block image format, and reading it lazily: origin, cache, fetch, FUSE, mounts."""
