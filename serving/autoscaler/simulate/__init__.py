"""Autoscaling policies against replayed and made traffic, in simulated time."""
