"""`vitq demo`: the whole chain on the model and the images that come with the package, a table of what bits cost, and a report.

Leaves a complete run folder of the mixed plan; the uniform plans are complete ones in folders below it. Until then a mark lies in the
folder: a demo that was interrupted or killed begins anew there, without --force.
"""

import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitq.cli import options
from vitq.cli.bench import usable_cores
from vitq.cli.chain import digest_of, refuse_unwritable
from vitq.cli.evaluate import flat, save_result
from vitq.cli.profile import remembering
from vitq.cli.report import write_report
from vitq.cli.terminal import Terminal, json_text
from vitq.commands import BENCH, CHECKPOINT, ONNX, PLAN, PROFILE, REPORT, STAIRCASE
from vitq.errors import UsageError
from vitq.units import in_decimals, in_units
from vitq.whole import locked

if TYPE_CHECKING:
    from rich.table import Table

    from vitq.artifacts import Profile
    from vitq.images import Images
    from vitq.models import LoadedModel

DEMO_DATA = Path(__file__).parents[1] / "demo_data"
UNFINISHED = ".unfinished-demo"
MIXED = "mixed 3.0"
PLANS: dict[str, dict[str, Any]] = {"uniform 8": {"uniform": "8"}, "uniform 3": {"uniform": "3"}, MIXED: {"budgets": ["3.0"]}}


def demo(
    run_dir: Annotated[Path, typer.Option("--run-dir", help="The folder to make.")] = Path("vitq-demo"),
    seed: options.UnusedSeed = None,
    device: options.UnusedDevice = "cpu",
    force: options.Force = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Run the whole chain on the model and images that come with vitq."""
    terminal = Terminal(quiet, verbose, as_json)
    begun = run_dir / UNFINISHED
    if run_dir.exists() and not (run_dir.is_dir() and (force or begun.is_file())):
        raise UsageError(f"{run_dir} exists already; give --force to replace what the demo writes there, or another --run-dir")
    refuse_unwritable(run_dir / PROFILE)
    run_dir.mkdir(parents=True, exist_ok=True)
    begun.touch()
    try:
        with locked(begun, wait=False):
            _make(run_dir, terminal)
            begun.unlink()
    except BlockingIOError:
        raise UsageError(f"another demo is at work in {run_dir}; wait for it, or give another --run-dir") from None


def _make(run_dir: Path, terminal: Terminal) -> None:
    from vitq.cli.sources import LoadingOptions
    from vitq.images import open_images
    from vitq.importance import profile
    from vitq.models import load

    started = time.perf_counter()
    model = load(str(DEMO_DATA / "vit_cifar10"))
    calibration = open_images(DEMO_DATA / "calibration.tar", model.data_config, class_names=model.label_names)
    test = open_images(DEMO_DATA / "test.tar", model.data_config, num_images=None, batch_size=100, class_names=model.label_names)
    terminal.note(
        f"a ViT with {len(model.label_names)} classes: {calibration.num_listed} calibration images, {test.num_listed} test images"
    )
    terminal.note("profile: what each layer's bits are worth")
    with terminal.watching(calibration, "profile"):
        found = remembering(profile(model, calibration), model, LoadingOptions(), calibration, 0)
    rows = [_quantized(name, found, model, calibration, test, run_dir, terminal) for name in PLANS]
    terminal.note("latency: one image at a time, all files in turn")
    rows = _with_latencies([_float(model, test), *rows], model, test)
    terminal.note("report: everything on one page")
    file = _report(found, rows, model, run_dir)
    seconds = time.perf_counter() - started
    document = {"run_dir": str(run_dir), "results": [row.document() for row in rows], "report": str(file), "seconds": seconds}
    terminal.result(document, _table(rows), f"took {seconds:.0f} s; everything is in {run_dir}, and {file} shows it")
    terminal.next(looking_at(file))


def looking_at(page: Path) -> str:
    """The command that shows a page in the browser, from any folder and whatever is in its path."""
    return shlex.join(["python3", "-m", "webbrowser", page.resolve().as_uri()])


@dataclass(frozen=True)
class _Row:
    """One line of the table; `file` is None for the float model, whose file is made for the measurement only."""

    name: str
    measures: dict[str, Any]
    file: Path | None
    file_bytes: int = 0
    median_ms: float = 0.0
    p90_ms: float = 0.0

    def document(self) -> dict[str, Any]:
        return {"name": self.name} | self.measures | {"file_bytes": self.file_bytes, "median_ms": self.median_ms}


def _quantized(
    name: str, found: "Profile", model: "LoadedModel", calibration: "Images", test: "Images", run_dir: Path, terminal: Terminal
) -> _Row:
    """Allocates, calibrates, exports and evaluates one plan, each into the plan's run folder."""
    from vitq import checkpoint
    from vitq.accuracy import evaluate, onnx_runnable
    from vitq.allocation import allocate
    from vitq.artifacts import save
    from vitq.calibration import calibrate
    from vitq.onnx_file import export

    folder = run_dir if name == MIXED else run_dir / name.replace(" ", "-")
    terminal.note(f"{name}: allocate, calibrate, export, evaluate")
    plan = allocate(found, **PLANS[name]).plan
    plan = plan.model_copy(update={"made_from": plan.made_from | {"profile": digest_of(found)}})
    save(found, folder / PROFILE, force=True)
    save(plan, folder / PLAN, force=True)
    with terminal.watching(calibration, f"{name}: calibrate") as progress:
        calibrated = calibrate(model, plan, calibration, progress=progress)
    images = found.made_from["images"]
    calibrated = replace(
        calibrated, made_from=calibrated.made_from | {"calibration": calibrated.made_from["calibration"] | {"images": images}}
    )
    checkpoint.save(calibrated, folder / CHECKPOINT, force=True)
    with terminal.watching(calibration, f"{name}: export") as progress:
        report = export(calibrated, folder / ONNX, (batch for batch, _ in calibration), force=True, progress=progress)
    with terminal.watching(test, f"{name}: evaluate"):
        measures = flat(evaluate(onnx_runnable(folder / ONNX), test, model.module))
    save_result(measures, folder, ONNX)
    return _Row(name, measures, folder / ONNX, report.file_bytes)


def _float(model: "LoadedModel", test: "Images") -> _Row:
    from vitq.accuracy import evaluate

    return _Row("float", flat(evaluate(model.module, test)), None)


def _with_latencies(rows: Sequence[_Row], model: "LoadedModel", test: "Images") -> list[_Row]:
    from vitq.bench import export_float, latencies
    from vitq.rewrites import prepare

    image = next(iter(test))[0][:1]
    with tempfile.TemporaryDirectory(prefix="vitq-") as folder:
        file = Path(folder) / "float.onnx"
        export_float(prepare(model)[0], file)
        measured = latencies([row.file or file for row in rows], image)
        sizes = [(row.file or file).stat().st_size for row in rows]
    return [replace(row, file_bytes=size, **vars(latency)) for row, size, latency in zip(rows, sizes, measured, strict=True)]


def _report(found: "Profile", rows: Sequence[_Row], model: "LoadedModel", run_dir: Path) -> Path:
    """Leaves the staircase and all rows' results in the mixed plan's folder, as commands would, and shows the folder on a page."""
    from vitq.allocation import as_json, pareto
    from vitq.bench import Row
    from vitq.whole import write_whole

    write_whole(run_dir / STAIRCASE, lambda temporary: temporary.write_text(as_json(pareto(found)), encoding="utf-8"))
    timed = []
    for row in rows:
        name = row.file.relative_to(run_dir).as_posix() if row.file else "float32"
        save_result(row.measures, run_dir, name if row.file else model.source)
        ratios = {"images_per_second": 1000 / row.median_ms, "speedup": rows[0].median_ms / row.median_ms}
        timed.append(asdict(Row(name, 1, usable_cores(), row.median_ms, row.p90_ms, **ratios)))
    write_whole(run_dir / BENCH, lambda temporary: temporary.write_text(json_text({"results": timed, "files": []}), encoding="utf-8"))
    write_report(run_dir, run_dir / REPORT)
    return run_dir / REPORT


def _table(rows: Sequence[_Row]) -> "Table":
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("")
    for title in ("top-1 %", "agreement %", "KL nats", "file", "latency ms"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        agreement, kl = row.measures.get("agreement"), row.measures.get("kl")
        table.add_row(
            row.name,
            f"{row.measures['top1']:.1f}",
            "-" if agreement is None else f"{agreement:.1f}",
            "-" if kl is None else in_decimals(kl),
            in_units(row.file_bytes, "B"),
            f"{row.median_ms:.2f}",
        )
    return table
