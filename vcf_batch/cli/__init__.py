"""The command line: options become a RunConfig, errors become exit codes. Nothing else happens here.

Commands stand by stage in the life of a run, and each stage is a module: :mod:`~vcf_batch.cli.before`,
:mod:`~vcf_batch.cli.run`, :mod:`~vcf_batch.cli.look`, :mod:`~vcf_batch.cli.mend`, :mod:`~vcf_batch.cli.after` and
:mod:`~vcf_batch.cli.model`. What their commands share is in :mod:`~vcf_batch.cli.command`; old names are in
:mod:`~vcf_batch.cli.aliases`.
"""

import itertools
from collections.abc import Mapping, Sequence

import click

import vcf_batch
from vcf_batch.cli import after, before, look, mend, model
from vcf_batch.cli.aliases import ALIASES, evaluate, train_aligner
from vcf_batch.cli.command import Group
from vcf_batch.cli.run import generate

# The job scripts of version 0.1 import their commands from here, which a user may have copied.
__all__ = ["COMMANDS_BY_STAGE", "evaluate", "generate", "main", "train_aligner"]

COMMANDS_BY_STAGE: Mapping[str, Sequence[click.Command]] = {
    "Before a run": (before.manifest, before.plan, before.preview),
    "Run": (generate,),
    "Look at a run": (look.status, look.report),
    "Check and mend": (mend.verify, mend.repair),
    "After a run": (after.score, after.export, after.push, after.card),
    "Models": (model.model,),
}
"""Commands in the order of a run's life, under the headings of the help text."""


@click.group(
    cls=Group,
    stages=COMMANDS_BY_STAGE,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(vcf_batch.__version__, prog_name="vcf-batch")
def main() -> None:
    """Generate images that follow prompts and reference images, in bulk, on a Ray cluster."""


for each in (*itertools.chain.from_iterable(COMMANDS_BY_STAGE.values()), *ALIASES):
    main.add_command(each)
