"""``score --with duplicates``: the rows of an output whose image, or whose reference, an earlier row has too.

:mod:`~vcf_batch.commands.score.duplicates.search` says how, :mod:`~vcf_batch.commands.score.duplicates.adding` searches
and commits. What is compared comes from ``hash_reader`` or ``embedding_reader``, and is compared by ``comparison``,
``near_hashes`` and ``near_embeddings``.
"""
