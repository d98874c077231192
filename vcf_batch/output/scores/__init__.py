"""Scores that were added to an output after its run, in the folder ``_scores``, which no reader of shards globs.

A score has a definition, ``_scores/NAME.json``, and for each shard of the output ``_scores/NAME/00000.parquet``, with
one row for every row of the shard, and a receipt of its own, ``00000_stats.json``. The receipt is written last, and has
the SHA-256 of the parquet of the shard that was scored. So the scores of a shard count as absent once a repair has
replaced the shard. No file of the output itself changes.
"""
