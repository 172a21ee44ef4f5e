"""The kernel side of lazy reading: FUSE protocol, the server, the keeper of its fds."""
