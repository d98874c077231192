"""Generate a data set on a Ray cluster: the command ``vcf-batch generate`` as a job's entry point.

::

    ray job submit --working-dir . -- python jobs/generate.py s3://bucket/manifest.parquet s3://bucket/output \\
        --model s3://bucket/model

The output must be a URL or an absolute path on storage that every node shares; the job's working directory is a
temporary copy.
"""

import sys
from pathlib import Path

# Python puts this file's folder on the path, not the folder that holds the package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vcf_batch.__main__ import main

if __name__ == "__main__":
    main("vcf_batch.cli.run", "generate", "jobs/generate.py")
