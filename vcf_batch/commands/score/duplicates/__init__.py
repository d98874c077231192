"""``score --with duplicates``: the rows of an output whose image, or whose reference, an earlier row has too.

:mod:`~vcf_batch.commands.score.duplicates.search` says how, :mod:`~vcf_batch.commands.score.duplicates.adding` searches
and commits. What is compared comes from ``reading``, and how it is compared is in ``near_hashes`` and ``tokens``.
"""
