"""``python -m vcf_batch``: the same command as ``vcf-batch``."""

from vcf_batch.cli import main

main(prog_name="python -m vcf_batch")
