"""Scores that are added to an output: a shard is read and decoded ahead, scored, and given back as files."""
