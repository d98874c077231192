"""``python -m vcf_batch``: the same command as ``vcf-batch``, whose entry point is here, as is that of ``jobs/``."""

import io
import sys

from vcf_batch import ending


def main(module: str = "vcf_batch.cli", name: str = "main", prog_name: str | None = None) -> None:
    """Run a command and end this process with its exit code, whatever signals come.

    Args:
        module: module of the command.
        name: name of the command in it.
        prog_name: name of the program in help texts; None is that of the script.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a name in a message must not end a run
        ending.install()
        ending.finish(_exit_code(module, name, prog_name))
    except KeyboardInterrupt:
        ending.finish(_interrupted())
    raise SystemExit  # with the code that is settled


def _exit_code(module: str, name: str, prog_name: str | None) -> int:
    """Run the command; its exit code."""
    import importlib  # here, as everything that takes time: the handlers come first

    import click

    try:
        code = getattr(importlib.import_module(module), name).main(prog_name=prog_name, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return _interrupted()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        if ending.is_interrupted():  # Any exception after a signal is a consequence of the signal.
            return _interrupted()
        raise


def _interrupted() -> int:
    import click

    click.echo("\nInterrupted.", err=True)
    return ending.code()


if __name__ == "__main__":
    main(prog_name="python -m vcf_batch")
