"""What commands share: how they end, and where a run's parts are that have moved."""

import traceback
from collections.abc import Callable
from typing import Any

import click

from vcf_batch.errors import Interrupted, VcfBatchError, printable


class Command(click.Command):
    """A command that ends with the exit codes of :mod:`vcf_batch.errors`, and without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Interrupted as stop:
            click.echo("\nStopped. What is finished is kept: rerun the same command to go on.", err=True)
            ctx.exit(stop.exit_code)
        except KeyboardInterrupt:
            click.echo("\nStopped.", err=True)
            ctx.exit(130)
        except VcfBatchError as error:
            self._show(ctx, error, f"Error: {error}")
            ctx.exit(error.exit_code)
        except Exception as error:
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


def moved_option(name: str) -> Callable[..., Any]:
    """An option for something that a run has used and that is elsewhere now."""
    return click.option(f"--{name}", metavar="URL", help=f"Where the run's {name} is now, if that has moved.")


def moved(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options for everything that a run has used."""
    for name in ("lpips-weights", "safety-checker", "pno-guide", "judge", "model", "manifest"):
        command = moved_option(name)(command)
    return command
