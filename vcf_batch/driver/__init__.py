"""Which shard goes to which worker, what is done and what failed, and the loop that decides it.

No Ray and no torch: the loop sees a cluster as :class:`vcf_batch.driver.cluster.Cluster`, so that it can be simulated.
"""
