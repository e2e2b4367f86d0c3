"""`vitq`: the commands joined, and faults turned into messages and exit codes.

What loads torch is imported inside the commands, so that `vitq --help` answers at once.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

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
from vitq.errors import VitqError

app = typer.Typer(
    name="vitq",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (profile, allocate, calibrate, finetune, export, evaluate, bench, report, synthesize, show, doctor, demo):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0, or the exit code of the fault, whose message goes to stderr.

    Args:
        arguments: what follows `vitq`; by default the process's own arguments.
    """
    try:
        app(args=arguments)
    except VitqError as error:
        print(f"vitq: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


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
