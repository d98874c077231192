"""What commands share: options, the configuration of a run, how a run is started, and how a command ends."""

import dataclasses
import json
import logging
import os
import re
import shlex
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from vcf_batch import ending, storage
from vcf_batch.cli import documents, settings_file
from vcf_batch.cli.documents import Fields
from vcf_batch.config.mapping import meant
from vcf_batch.config.run_config import RunConfig
from vcf_batch.driver.progress import clear_bars, configure_log, plural, show_steps
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

if TYPE_CHECKING:
    from vcf_batch.driver.ledger import Summary

_log = logging.getLogger(__name__)

_OPTION_OR_WORD = re.compile(r"""--\S+ (?:"[^"]*"|'[^']*'|(?!-)\S+)|\S+""")
"""An option with its value, which stay on one line, or another word of a command line."""

_WHOLE = 1000
"""Most characters of a command's sentence in a list of commands: it is wrapped, and never cut off."""

_SETTINGS = frozenset(field.name for field in dataclasses.fields(RunConfig))


class Command(click.Command):
    """A command that ends with the exit codes of :mod:`vcf_batch.errors`, and without a traceback.

    Args:
        examples: command lines that the help text shows, each with what it is for.
        document: fields of what --json prints; see :mod:`vcf_batch.cli.documents`.
        groups: names of parameters by the heading that their options stand under; all others stand before them.
    """

    def __init__(
        self,
        *args: Any,
        examples: Sequence[tuple[str, str]] = (),
        document: Fields = MappingProxyType({}),
        groups: Mapping[str, Sequence[str]] = MappingProxyType({}),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.examples, self.document, self.groups = examples, document, groups

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            flags = {str(each.name): each.opts[-1] for each in self.params if isinstance(each, click.Option)}
            found = [flags[name] for name in meant(error.option_name.lstrip("-").replace("-", "_"), flags)]
            hint = f" Did you mean {' or '.join(found)}?" if found else ""
            raise click.NoSuchOption(error.option_name, f"{error.message}{hint}", ctx=ctx) from None

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help_text(ctx, formatter)
        if not self.examples:
            return
        with formatter.section("Examples"):
            for line, purpose in self.examples:
                formatter.write_text(f"{purpose}:")
                formatter.write(_to_copy(line, formatter.current_indent + 2, formatter.width))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, records in self.option_records(ctx).items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def option_records(self, ctx: click.Context) -> dict[str, list[tuple[str, str]]]:
        """Each option as it is written, with its text, by the heading that it stands under."""
        headings = {name: heading for heading, names in self.groups.items() for name in names}
        found: dict[str, list[tuple[str, str]]] = {"Options": [], **{heading: [] for heading in self.groups}}
        order = [*headings]
        parameters = sorted(self.get_params(ctx), key=lambda each: order.index(each.name) if each.name in order else -1)
        for each in parameters:
            if not isinstance(each, click.Argument) and (record := each.get_help_record(ctx)):
                found[headings.get(str(each.name), "Options")].append(record)
        return {heading: records for heading, records in found.items() if records}

    def invoke(self, ctx: click.Context) -> Any:
        verbosity = ctx.params.get("verbosity") or "normal"
        log_format = ctx.params.get("log_format") or "text"
        configure_log(log_format, verbosity)  # From the first line on, and in errors.
        show_steps(log_format, verbosity)
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Interrupted as stop:
            self._show(
                ctx, stop, "\nInterrupted. What is finished is kept: rerun the same command to go on.", stop.exit_code
            )
            ctx.exit(stop.exit_code)
        except KeyboardInterrupt as stop:
            self._show(ctx, stop, "\nInterrupted.", ending.code())
            ctx.exit(ending.code())
        except VcfBatchError as error:
            self._show(ctx, error, f"Error: {error}", error.exit_code)
            ctx.exit(error.exit_code)
        except Exception as error:
            if ending.is_interrupted():  # Any exception after a signal is a consequence of the signal.
                self._show(ctx, error, "\nInterrupted.", ending.code())
                ctx.exit(ending.code())
            message = " ".join(str(error).split()) or "no message"
            words = f"Unexpected {type(error).__name__}: {message}\nRerun with --debug for the traceback."
            self._show(ctx, error, words, 1)
            ctx.exit(1)

    def _show(self, ctx: click.Context, error: BaseException, message: str, exit_code: int) -> None:
        if ctx.meta.get("vcf_batch.debug"):
            message = "".join(traceback.format_exception(error)) + message
        if ctx.params.get("log_format") == "json":
            _log.error(printable(message).strip(), extra={"event": "error", "exit_code": exit_code})
        else:
            tell_line(message, err=True)


class Group(click.Group):
    """A group whose help text lists commands in order, each with a whole sentence.

    Args:
        stages: the commands by the heading that they stand under; None lists all of them under one.
    """

    def __init__(self, *args: Any, stages: Mapping[str, Sequence[click.Command]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stages = stages

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        stages = self._stages or {"Commands": [*self.commands.values()]}
        width = max(len(each.name or "") for commands in stages.values() for each in commands)
        for stage, commands in stages.items():
            with formatter.section(stage):
                formatter.write_dl([(f"{each.name:<{width}}", each.get_short_help_str(_WHOLE)) for each in commands])


def _to_copy(line: str, indent: int, width: int) -> str:
    """A command line as a help text shows it: where it is too long for the width, a shell goes on after each line."""
    parts = [""]
    for word in _OPTION_OR_WORD.findall(line):
        if parts[-1] and len(parts[-1]) + len(word) + 1 > width - indent - len(" \\"):
            parts.append(" ")
        parts[-1] += f" {word}" if parts[-1] else word
    return "".join(f"{'':{indent}}{part}\n" for part in " \\\n".join(parts).splitlines())


def _debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    ctx.meta["vcf_batch.debug"] = value


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_debug, help="Show the traceback of an error."
)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as one JSON document instead of lines."
)


def tell(words: str, document: Mapping[str, Any], as_json: bool, err: bool = False) -> None:
    """Print the result of a command that is done: ``words`` for people, or ``document`` for a program.

    Args:
        words: the result in words.
        document: the same as plain JSON types.
        as_json: whether the document is printed.
        err: whether it goes to standard error rather than standard output.
    """
    ending.done()
    click.echo(_printed(document) if as_json else printable(words), err=err)


def _printed(document: Mapping[str, Any]) -> str:
    command = click.get_current_context().command
    assert isinstance(command, Command)
    documents.check(str(command.name), document, command.document)
    return json.dumps(document, indent=2)


def tell_line(line: str, err: bool = False) -> None:
    """Print a line of a command that goes on, where its bar was.

    Args:
        line: the line.
        err: whether it goes to standard error rather than standard output.
    """
    clear_bars()
    click.echo(printable(line), err=err)


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
    source = ctx.params.get("config")
    values = {} if source is None else settings_file.read(source)
    values |= given(ctx) | fixed
    for name in ("num_workers", "batch_size"):
        if values.get(name) == "auto":
            values[name] = None
    return RunConfig.from_mapping(values)


def run(
    config: RunConfig,
    choose_redo: Callable[[], Mapping[int, bytes]] = dict,
    push: str | None = None,
    as_json: bool = False,
    deadline: float | None = None,
) -> None:
    """Generate what is left, and what ``choose_redo`` names, and tell what became of it. Then push it to ``push``.

    Args:
        config: the configuration of the run.
        choose_redo: see :func:`vcf_batch.pool.launch.run`.
        push: where the output is copied after a run that succeeds; None for nowhere.
        deadline: see :func:`vcf_batch.pool.launch.run`.
        as_json: whether what became of it is printed as a document.
    """
    from vcf_batch import pool  # not at the top: ray is not needed to print a help text or refuse an option

    if push is not None:
        from vcf_batch.commands.push import check_target

        check_target(config.output, push)
    summary = pool.run(config, choose_redo, deadline)
    if push is None:
        ending.done()
    if as_json:
        click.echo(_printed(summary.to_dict()))
    elif config.log_format == "json":
        seconds = round(summary.seconds, 3)
        _log.info(str(summary), extra={"event": "run_finished", "rows": summary.rows, "seconds": seconds})
    else:
        _tell_run(config, summary)
    check_failed(config, summary)
    if push is not None:
        hand_on(config.output, push, err=as_json)


def check_failed(config: RunConfig, summary: "Summary") -> None:
    """Check the outcome of a run.

    Raises:
        TooManyFailedRows: more rows failed than ``max_failed`` allows.
    """
    if summary.failed_fraction > config.max_failed:
        raise TooManyFailedRows(
            f"{summary.counts['failed']:,} of {summary.rows:,} rows failed, more than --max-failed "
            f"{config.max_failed:g} allows. Their reasons are in the column error_message of {config.output}/*.parquet."
        )


def _tell_run(config: RunConfig, summary: "Summary") -> None:
    """Print what became of a run, and what may come next."""
    click.echo(str(summary))
    click.echo(f"To look at it: vcf-batch report {shlex.quote(redact(summary.output))}")
    if config.profile and summary.resumed_rows < summary.rows:
        from vcf_batch.setup.job import TRACE  # pyarrow is not needed to print a help text

        trace = storage.join(summary.output, TRACE)
        click.echo(f"To see where the time of a shard goes, open in https://ui.perfetto.dev: {redact(trace)}")
    if summary.counts["failed"]:
        click.echo(f"To generate the failed rows again: {repair_command(summary.output)}")


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


def hand_on(output: str, target: str, as_json: bool = False, partial: bool = False, err: bool = False) -> None:
    """Copy an output to another storage, and tell what was copied and what was left out.

    Args:
        output: the output.
        target: where it is copied.
        as_json: whether a document is told.
        partial: whether shards may be left out.
        err: whether words go to standard error, as standard output has a document.

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
    tell("\n".join([words, *pushed.left_out]), document, as_json, err)
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
