"""What commands share: options, the configuration of a run, how a run is started, and how a command ends."""

import dataclasses
import json
import os
import shlex
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import click
from click.core import ParameterSource

from vcf_batch import config as settings
from vcf_batch import ending, storage
from vcf_batch.config import RunConfig
from vcf_batch.driver.progress import plural
from vcf_batch.errors import (
    DamageFound,
    Interrupted,
    TooManyFailedRows,
    Unfinished,
    UsageError,
    VcfBatchError,
    printable,
    redact,
)

MAX_CONFIG_BYTES = 1 << 20

_SETTINGS = frozenset(field.name for field in dataclasses.fields(RunConfig))


class Command(click.Command):
    """A command that ends with the exit codes of :mod:`vcf_batch.errors`, and without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Interrupted as stop:
            click.echo("\nInterrupted. What is finished is kept: rerun the same command to go on.", err=True)
            ctx.exit(stop.exit_code)
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(ending.code())
        except VcfBatchError as error:
            self._show(ctx, error, f"Error: {error}")
            ctx.exit(error.exit_code)
        except Exception as error:
            if ending.is_interrupted():  # Any exception after a signal is a consequence of the signal.
                click.echo("\nInterrupted.", err=True)
                ctx.exit(ending.code())
            message = " ".join(str(error).split()) or "no message"
            self._show(
                ctx, error, f"Unexpected {type(error).__name__}: {message}\nRerun with --debug for the traceback."
            )
            ctx.exit(1)

    def _show(self, ctx: click.Context, error: Exception, message: str) -> None:
        if ctx.meta.get("vcf_batch.debug"):
            message = "".join(traceback.format_exception(error)) + message
        click.echo(printable(message), err=True)


def _debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    ctx.meta["vcf_batch.debug"] = value


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_debug, help="Show the traceback of an error."
)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as one JSON document instead of lines."
)


def tell(words: str, document: Mapping[str, Any], as_json: bool) -> None:
    """Print the result of a command that is done on standard output: ``words`` for people, or ``document`` for a
    program."""
    ending.done()
    click.echo(json.dumps(document, indent=2) if as_json else printable(words))


def moved_option(name: str) -> Callable[..., Any]:
    """An option for something that a run has used and that is elsewhere now."""
    what = "IP-Adapter" if name == "ip-adapter" else name.replace("-", " ")
    text = f"New place of the run's {what}, if it has moved since the run."
    return click.option(f"--{name}", metavar="URL", help=text)


def moved(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options for everything that a run has used."""
    weights = ("lpips-weights", "safety-checker", "pno-guide", "judge", "image-encoder", "ip-adapter")
    for name in (*weights, "model", "manifest"):
        command = moved_option(name)(command)
    text = "New places of the run's LoRAs, all of them, if one has moved since the run."
    return click.option("--lora", multiple=True, metavar="NAME=URL[:SCALE]", help=text)(command)


def given(ctx: click.Context) -> dict[str, Any]:
    """The settings of a run that the command line names, rather than leaves to their defaults."""
    return {
        name: value
        for name, value in ctx.params.items()
        if name in _SETTINGS and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }


def run_config(ctx: click.Context, **fixed: Any) -> RunConfig:
    """The configuration of a run: defaults, overridden by the file of --config, the command line, and ``fixed``.

    Raises:
        UsageError: the file cannot be read, or a setting is wrong.
    """
    values: dict[str, Any] = {}
    source = ctx.params.get("config")
    if source is not None:
        try:
            text = storage.read_bytes(source, limit=MAX_CONFIG_BYTES).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the configuration file {source}: {error}") from error
        values = settings.load_yaml(text, redact(source))
        if settled := sorted(settings.SETTLED & values.keys()):
            raise UsageError(f"{settled[0]} in {redact(source)} is no option: leave it out, or give strength instead")
    values |= given(ctx) | fixed
    for name in ("num_workers", "batch_size"):
        if values.get(name) == "auto":
            values[name] = None
    return RunConfig.from_mapping(values)


def run(config: RunConfig, choose_redo: Callable[[], Mapping[int, bytes]] = dict, push: str | None = None) -> None:
    """Generate what is left, and what ``choose_redo`` names, and tell what became of it. Then push it to ``push``."""
    from vcf_batch import pool  # not at the top: ray is not needed to print a help text or refuse an option
    from vcf_batch.setup.job import TRACE  # nor pyarrow

    if push is not None:
        from vcf_batch.commands.push import check_target

        check_target(config.output, push)
    summary = pool.run(config, choose_redo)
    if push is None:
        ending.done()
    click.echo(str(summary))
    click.echo(f"To look at it: vcf-batch report {shlex.quote(redact(summary.output))}")
    if config.profile and summary.resumed_rows < summary.rows:
        trace = storage.join(summary.output, TRACE)
        click.echo(f"To see where the time of a shard goes, open in https://ui.perfetto.dev: {redact(trace)}")
    if summary.counts["failed"]:
        click.echo(f"To generate the failed rows again: {repair_command(summary.output)}")
    if summary.failed_fraction > config.max_failed:
        raise TooManyFailedRows(
            f"{summary.counts['failed']:,} of {summary.rows:,} rows failed, more than --max-failed "
            f"{config.max_failed:g} allows. Their reasons are in the column error_message of {config.output}/*.parquet."
        )
    if push is not None:
        hand_on(config.output, push)


_ENDINGS = {
    ".png": "image/png",
    **dict.fromkeys((".html", ".htm"), "text/html"),
    **dict.fromkeys((".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".svg", ".pdf"), "another"),
    **dict.fromkeys((".txt", ".md", ".json", ".csv", ".parquet", ".zip", ".gz", ".tar"), "another"),
}
"""Kinds of files by their endings. A name with any other ending is taken as it is."""


def check_ending(option: str, target: str, kind: str) -> None:
    """Refuse a file's name whose ending says that it is of another kind than the one that is written.

    Args:
        option: the option that names the file.
        target: the file's path or URL.
        kind: MIME type of what is written, ``image/png`` or ``text/html``.

    Raises:
        UsageError: the ending is that of another kind.
    """
    found = _ENDINGS.get(os.path.splitext(storage.name(target))[1].lower(), kind)
    if found != kind:
        what, ending = ("a PNG", ".png") if kind == "image/png" else ("an HTML page", ".html")
        raise UsageError(f"{option} {redact(target)}: what is written is {what}; give it a name that ends in {ending}")


def repair_command(output: str) -> str:
    """The command that mends an output."""
    return f"vcf-batch repair {shlex.quote(redact(output))}"


def hand_on(output: str, target: str, as_json: bool = False, partial: bool = False) -> None:
    """Copy an output to another storage, and tell what was copied and what was left out.

    Raises:
        DamageFound, Unfinished: shards are left out, and ``partial`` is not given.
    """
    from vcf_batch.commands.push import push
    from vcf_batch.output.output import Output  # pyarrow is not needed to print a help text

    pushed = push(Output(output), target)
    document = {
        "target": redact(target),
        "copied": pushed.copied,
        "there": pushed.there,
        "damaged": dict(pushed.damaged),
        "unfinished": pushed.unfinished,
        "scores": {"copied": pushed.scores.copied, "damaged": pushed.scores.damaged},
    }
    words = f"{redact(target)}: {plural(pushed.copied, 'shard')} copied, {pushed.there:,} were there"
    words += f"; scores of {plural(pushed.scores.copied, 'shard')} copied" if pushed.scores.copied else ""
    tell("\n".join([words, *pushed.left_out]), document, as_json)
    left = f"{len(pushed.damaged) + pushed.unfinished:,} of {pushed.shards:,} shards are left out"
    again = "then push again; or push with --partial"
    if partial:
        return
    if pushed.damaged:
        raise DamageFound(f"{left}, {len(pushed.damaged):,} damaged. To mend them: {repair_command(output)}; {again}")
    if pushed.scores.damaged:
        raise DamageFound(
            f"scores of {len(pushed.scores.damaged):,} shards are left out, as they are damaged. To mend them: delete "
            f"the files that are named, rerun the command of 'vcf-batch score', {again}"
        )
    if pushed.unfinished:
        raise Unfinished(f"{left}, as they are not generated yet. Rerun the command of the run, {again}")
