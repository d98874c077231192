"""The driver of a run: the loop that hands shards to workers, and the record of what is finished and what failed.

No Ray and no torch: the loop sees a cluster as :class:`vcf_batch.driver.cluster.Cluster`, so that it can be simulated.
"""
