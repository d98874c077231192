"""A worker: one shard in, its staged files and its receipt out. No Ray."""
