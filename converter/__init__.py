"""Turns ordinary OCI images into block images."""
