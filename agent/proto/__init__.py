"""containerd's wire format: our own minimal .proto files, and what protoc makes of them (committed)."""
