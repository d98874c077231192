"""What ``verify`` does with each shard, in one process or in several."""
