"""Which shard goes to which worker, what is done and what failed. No Ray, no torch."""
