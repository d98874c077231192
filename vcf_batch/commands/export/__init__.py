"""``export``: a new dataset made of the successful rows of one or several outputs, with receipts of its own.

Rows keep the order of the outputs that are named, of their shards, and of their rows. Each row that is kept goes to the
open shard of its split, which is closed when it is full. So the bytes depend on the outputs and the settings alone.
"""
