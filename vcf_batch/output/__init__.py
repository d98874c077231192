"""The files of an output: shards, columns, receipts, run.json, the lease and the commits."""
