"""The command line: options become a RunConfig, errors become exit codes. Nothing else happens here.

A family of commands is a module; what their commands share is in :mod:`vcf_batch.cli.command`.
"""

import click

import vcf_batch
from vcf_batch.cli.checking import repair, verify
from vcf_batch.cli.evaluation import evaluate
from vcf_batch.cli.generation import generate
from vcf_batch.cli.looking import card, contact_sheet, push, report, status
from vcf_batch.cli.manifests import manifest
from vcf_batch.cli.planning import plan, preview
from vcf_batch.cli.training import assemble, train_aligner

__all__ = ["evaluate", "generate", "main", "train_aligner"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(vcf_batch.__version__, prog_name="vcf-batch")
def main() -> None:
    """Generate images that follow prompts and reference images, in bulk, on a Ray cluster."""


for command in (
    manifest,
    plan,
    preview,
    generate,
    status,
    contact_sheet,
    evaluate,
    report,
    card,
    push,
    verify,
    repair,
    train_aligner,
    assemble,
):
    main.add_command(command)
