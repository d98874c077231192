"""``verify`` and ``repair``: an output against what it should be."""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from vcf_batch.cli import keys_file
from vcf_batch.cli.command import Command, debug_option, given, json_option, moved, repair_command, run, tell, tell_line
from vcf_batch.cli.documents import DOCUMENTS
from vcf_batch.cli.option_groups import WORKER_GROUPS
from vcf_batch.cli.run import generate
from vcf_batch.driver.progress import plural
from vcf_batch.errors import DamageFound, Unfinished, UsageError, redact

if TYPE_CHECKING:
    from vcf_batch.commands.verify import Finding

_processes_option = click.option(
    "--processes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes that read shards, about 200 MB each.  [default: one for each processor, or fewer for few rows]",
)


@click.command(
    cls=Command,
    document=DOCUMENTS["verify"],
    examples=(
        ("vcf-batch verify out/demo", "Everything"),
        (
            "vcf-batch verify s3://bucket/dataset --sample 0.01 --regenerate 8",
            "A hundredth, and eight samples drawn again",
        ),
    ),
)
@click.argument("output")
@click.option(
    "--sample",
    type=click.FloatRange(min=0, max=1, min_open=True),
    metavar="FRACTION",
    help="Read only about this fraction of the shards, 0 to 1, and at least one: the same each time, and with a larger "
    "fraction these and more. Shards that are not generated yet are all told.  [default: 1]",
)
@_processes_option
@click.option(
    "--regenerate",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also draw N samples again, on this machine, and compare them with those in OUTPUT: byte for byte on the same "
    "type of device with the same versions, else within a mean difference of 5 of 255.",
)
@click.option("--regenerate-seed", type=int, default=0, show_default=True, help="Chooses the samples of --regenerate.")
@moved
@json_option
@debug_option
@click.pass_context
def verify(
    ctx: click.Context,
    output: str,
    sample: float | None,
    processes: int | None,
    regenerate: int | None,
    regenerate_seed: int,
    as_json: bool,
    **_: Any,
) -> None:
    """Read all of OUTPUT again, and tell what is damaged, and why.

    Each shard that is damaged or not generated yet is named. Receipts are compared with the files, tars with parquets,
    parquets with the manifest; every image is decoded. Scores that were added are compared with their receipts. OUTPUT
    may be an export: its files are compared with its receipts and its rows, and keys with one another.

    Exit codes: 0 no damage; 1 unexpected; 2 no output there; 4 the model is not that of the run; 5 damage; 6 no damage,
    but shards are not generated yet, whether a run is at work or not.
    """
    from vcf_batch.commands import verify
    from vcf_batch.commands.score.check import check_scores
    from vcf_batch.commands.verifying.processes import default_processes
    from vcf_batch.output import lease
    from vcf_batch.output.output import AnExport, Output

    try:
        opened = Output(output, given(ctx))
    except AnExport:
        _verify_export(output, ctx, as_json)
        return
    chosen = None if sample is None else verify.sample(opened.plan, sample)
    rows_read = opened.plan.num_rows if chosen is None else sum(len(opened.plan[index]) for index in chosen)
    findings = _found(verify.check(opened, chosen, processes or default_processes(rows_read)), as_json)
    of_scores = _found(check_scores(opened, chosen), as_json)
    unfinished = sum(finding.kind == "unfinished" for finding in findings)
    if regenerate is not None and not _damaged(findings) and not unfinished:
        from vcf_batch.vcf import quiet  # nor torch to read files

        quiet()
        from vcf_batch.commands import regenerate as regeneration  # brings what would warn

        findings += _found(regeneration.regenerate(opened, regenerate, regenerate_seed), as_json)
    damaged_scores = _damaged(of_scores)
    findings, is_damaged = findings + of_scores, _damaged(findings)
    state = ""
    if unfinished:
        owner = lease.owner(opened.url)
        if owner is not None and owner.alive:
            state = f"process {owner.pid} on {owner.host} is at work since {owner.started}"
        else:
            state = "nobody is at work. Rerun the command of the run to go on"
    shards_read = len(opened.plan) if chosen is None else len(chosen)
    if as_json or not (_damaged(findings) or unfinished):
        document = {
            "output": redact(output),
            "rows": opened.plan.num_rows,
            "shards": len(opened.plan),
            "rows_read": rows_read,
            "shards_read": shards_read,
            "damaged": _damaged(findings),
            "unfinished": unfinished,
            "findings": [_told(one) for one in findings],
        }
        share = "" if chosen is None else f"; {shards_read:,} of them, with {plural(rows_read, 'row')}, were read"
        everything = f"{plural(opened.plan.num_rows, 'row')} in {plural(len(opened.plan), 'shard')}"
        tell(f"{redact(output)}: {everything}{share}, no damage", document, as_json)
    if is_damaged:
        raise DamageFound(f"{output} is damaged. To mend it: {repair_command(output)}")
    if damaged_scores:
        raise DamageFound(
            f"scores of {output} are damaged, and nothing else. To mend them: delete the files that are named, and "
            "rerun the command of 'vcf-batch score'"
        )
    if unfinished:
        others = "the others" if chosen is None else "those that were read"
        raise Unfinished(
            f"{output} is unfinished: {unfinished:,} of {len(opened.plan):,} shards are not generated yet, {others} "
            f"have no damage; {state}"
        )


def _verify_export(output: str, ctx: click.Context, as_json: bool) -> None:
    """Check what ``export`` wrote, and tell of it as :func:`verify` does."""
    from vcf_batch.commands.export.check import ExportCheck

    moved_things = (name for name in given(ctx) if name != "output")
    others = (*moved_things, "regenerate", "sample", "processes")
    if needless := [name for name in others if ctx.params.get(name) is not None]:
        option = needless[0].replace("_", "-")
        raise UsageError(f"{output} is an export, which --{option} is not for: verify the outputs that it was made of")
    check = ExportCheck(output)
    findings = _found(check.findings(), as_json)
    unfinished = sum(finding.kind == "unfinished" for finding in findings)
    if as_json or not (_damaged(findings) or unfinished):
        document = {
            "output": redact(output),
            "rows": check.record.rows,
            "shards": check.shards,
            "damaged": _damaged(findings),
            "unfinished": unfinished,
            "findings": [_told(one) for one in findings],
        }
        everything = f"{plural(check.record.rows, 'row')} in {plural(check.shards, 'shard')}"
        tell(f"{redact(output)}: {everything}, no damage", document, as_json)
    if _damaged(findings):
        raise DamageFound(
            f"{output} is damaged. To mend it: delete what is damaged, and rerun the command of the export"
        )
    if unfinished:
        raise Unfinished(f"{output} is unfinished; rerun the command of the export")


def _told(finding: "Finding") -> dict[str, object]:
    return {
        "place": finding.place,
        "cause": redact(finding.cause),
        "kind": finding.kind,
        "is_damage": finding.is_damage,
    }


def _found(findings: Iterable["Finding"], as_json: bool) -> list["Finding"]:
    """All findings; for people, each is printed as soon as it is found."""
    found = []
    for finding in findings:
        found.append(finding)
        if not as_json:
            tell_line(str(finding))
    return found


def _damaged(findings: Iterable["Finding"]) -> bool:
    return any(finding.is_damage for finding in findings)


_OWN = {"address": None, "log_format": "text", "verbosity": "normal", "num_workers": None, "max_failed": 0.0}
"""What a repair does not take from the run that it repairs."""


@click.command(
    cls=Command,
    document=DOCUMENTS["repair"],
    params=[option for option in generate.params if option.name in _OWN],
    groups=WORKER_GROUPS,
    examples=(
        ("vcf-batch repair out/demo", "What is damaged, missing or failed"),
        ('vcf-batch repair out/demo --where "clip_reference < 0.2"', "And samples that hardly follow their reference"),
        ("vcf-batch repair out/demo --keys flagged.txt", "And samples that were flagged in the report"),
    ),
)
@click.argument("output")
@click.option(
    "--where",
    metavar="SQL",
    help="Which rows to generate again: a condition on the columns of the parquets.  [default: status = 'failed'; none "
    "with --keys]",
)
@click.option(
    "--keys",
    metavar="FILE",
    help="A text file with a key on each line: rows to generate again, alone or together with those of --where.",
)
@click.option(
    "--trust-receipts",
    is_flag=True,
    help="Do not read all of OUTPUT first. A shard counts as whole if its files have the sizes in its receipt, and of "
    "its rows only the columns in --where are read. Risk: damage that keeps the size of a file is not found, stays "
    "there, and may hide rows from --where.",
)
@_processes_option
@moved
@json_option
@debug_option
@click.pass_context
def repair(
    ctx: click.Context,
    output: str,
    where: str | None,
    keys: str | None,
    trust_receipts: bool,
    processes: int | None,
    as_json: bool,
    **_: Any,
) -> None:
    """Generate again what is damaged, missing or failed in OUTPUT.

    OUTPUT is read first, as 'verify' reads it, unless --trust-receipts is given. Damaged and missing shards are
    generated whole. Of the other shards, only the rows that --where selects or --keys names are generated: their other
    samples stay, byte for byte. Keys, shards and settings stay as they are. A row that was sound gets the same image
    again, on the same type of device.

    Exit codes: those of 'generate'; 5 if OUTPUT is damaged in a way that generating does not mend.
    """
    from vcf_batch.commands.repair import Repair
    from vcf_batch.output.output import Output  # pyarrow and DuckDB are not needed to print a help text

    named = frozenset[str]() if keys is None else keys_file.read("--keys", keys)
    if where is None:
        where = "status = 'failed'" if keys is None else "false"
    opened = Output(output, _OWN | given(ctx))
    needed = Repair(opened, where, trust_receipts, named, processes)
    run(opened.config, lambda: needed.rows(functools.partial(tell_line, err=as_json)), as_json=as_json)
