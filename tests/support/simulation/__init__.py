"""A cluster, its storage and its drivers in virtual time: everything that happens follows from one integer.

Ray, clocks, storage and pictures are replaced. Queue, bisection, ledger, quarantine, commits, lease and retries are the
product's own.
"""
