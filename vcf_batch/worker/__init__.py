"""A worker: one task in, a shard's staged files and its receipt out. No Ray."""
