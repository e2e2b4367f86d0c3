"""`vitq`: the commands joined, and faults turned into messages and exit codes.

What loads torch is imported inside the commands, so that `vitq --help` answers at once.
"""

import io
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from vitq import __version__
from vitq.cli.allocate import allocate
from vitq.cli.bench import bench
from vitq.cli.calibrate import calibrate
from vitq.cli.demo import demo
from vitq.cli.doctor import doctor
from vitq.cli.evaluate import evaluate
from vitq.cli.export import export
from vitq.cli.finetune import finetune
from vitq.cli.profile import profile
from vitq.cli.report import report
from vitq.cli.show import show
from vitq.cli.synthesize import synthesize
from vitq.errors import InputError, UsageError, VitqError
from vitq.whole import refusal


class _Command(TyperCommand):
    """A command that knows whose option it was given, where that is another command's."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """As click does; raises UsageError for an option that only other commands have."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # click's NoSuchOption, which is at home in click or in typer, as typer's version has it
            name = getattr(error, "option_name", None)
            others = [f"`vitq {command}`" for command, options in _options(ctx).items() if name in options and command != self.name]
            if not others or name in _options(ctx)[str(self.name)]:
                raise
            near = " or ".join(found for found in getattr(error, "possibilities", None) or () if found.startswith(name))
            here = f" (did you mean {near}?)" if near else ""
            raise UsageError(f"{name} is no option of `vitq {self.name}`{here} but of {' and '.join(others)}; give it there") from None


def _options(ctx: typer.Context) -> dict[str, set[str]]:
    """The options that each command's help lists, by the command's name."""
    commands = getattr(ctx.parent and ctx.parent.command, "commands", {})
    listed = {name: (it for it in command.params if not getattr(it, "hidden", False)) for name, command in commands.items()}
    return {name: {word for it in found for word in it.opts} for name, found in listed.items()}


def going_on(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which after Ctrl-C says how to go on and ends with 130."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt as interruption:
            kept = getattr(interruption, "__notes__", ["nothing half-written is left; the same command again begins anew"])
            print(f"vitq: interrupted; {'; '.join(kept)}", file=sys.stderr)
            raise typer.Exit(130) from None

    return run


app = typer.Typer(
    name="vitq",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (profile, allocate, calibrate, finetune, export, evaluate, bench, report, synthesize, show, doctor, demo):
    app.command(cls=_Command)(going_on(command))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0, or the exit code of the fault, whose message goes to stderr.

    Args:
        arguments: what follows `vitq`; by default the process's own arguments.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without ± or ö gets their codes, as on stderr, not a traceback
    try:
        app(args=arguments, prog_name="vitq")
    except VitqError as error:
        print(f"vitq: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if (found := refusal(error)) is None:
            raise
        print(f"vitq: {error.filename or 'the output'}: {found[0]}; {found[1]}", file=sys.stderr)
        sys.exit(InputError.exit_code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vitq {__version__}")
        raise typer.Exit


@app.callback()
def vitq(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Mixed-precision quantization of vision transformers: from a trained checkpoint to an ONNX file that runs.

    A whole session: vitq profile MODEL --images PATH, vitq allocate --budget 4.0, vitq calibrate, vitq export. Or: vitq demo.
    """
