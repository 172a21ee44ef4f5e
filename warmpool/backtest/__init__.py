"""The back-test: what policies would have done on recorded demand, against the best that could be done."""
