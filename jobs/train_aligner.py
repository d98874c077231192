"""Train an aligner on a Ray cluster: the command ``vcf-batch model train`` as a job's entry point.

::

    ray job submit --working-dir . -- python jobs/train_aligner.py --model sd21 --data s3://bucket/coco \\
        --out s3://bucket/aligner --num-workers 4 --gpus-per-worker 1

The output must be a URL or an absolute path on storage that every node shares; the job's working directory is a
temporary copy.
"""

import sys
from pathlib import Path

# Python puts this file's folder on the path, not the folder that holds the package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vcf_batch.__main__ import main

if __name__ == "__main__":
    main("vcf_batch.cli.model", "train", "jobs/train_aligner.py")
