"""Tests of the block devices."""
