"""The environment of a worker's process. This module brings nothing, because the environment comes first."""


def environment(threads: int) -> dict[str, str]:
    """Variables of a worker: fixed threads, and cuBLAS workspaces that keep its sums in order.

    Args:
        threads: the run's ``cpus_per_worker``.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "false",
    }
