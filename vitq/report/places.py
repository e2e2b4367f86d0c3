"""Where things lay on the machine that wrote the report, which is nobody's business who reads it: whole paths become short ones.

A path below the folder that holds the run folder is shown from there, another by its last two parts. Relative ones stay as they were given.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitq.report.findings import Findings


def without_places(findings: Findings) -> Findings:
    """The findings with no whole path in them, be it a value, a name or a word of a remark."""
    folder = Path(findings.folder).absolute()
    benchmark = findings.benchmark
    names = [row.name for row in (*benchmark.results, *benchmark.files)] if benchmark else []
    texts = _texts([[file.made_from for file in findings.files], findings.exported, list(findings.evaluations), names, findings.folder])
    whole = sorted({text for text in texts if Path(text).is_absolute() and len(Path(text).parts) > 1}, key=len, reverse=True)
    found = re.compile("|".join(rf"(?<![\w./]){re.escape(text)}(?![\w-])" for text in whole) or r"(?!)")

    def short(value: Any) -> Any:
        if isinstance(value, str):
            return found.sub(lambda text: shown(text[0], folder), value)
        if isinstance(value, dict):
            return {short(key): short(item) for key, item in value.items()}
        return type(value)(map(short, value)) if isinstance(value, list | tuple) else value

    def artifact(value: Any) -> Any:
        return value and value.model_copy(update={"made_from": short(dict(value.made_from))})

    def named(rows: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(row.model_copy(update={"name": short(row.name)}) for row in rows)

    return replace(
        findings,
        folder=short(findings.folder),
        option=findings.option and f" --run-dir {shlex.quote(short(findings.folder))}",
        files=tuple(replace(file, made_from=short(dict(file.made_from))) for file in findings.files),
        profile=artifact(findings.profile),
        plan=artifact(findings.plan),
        calibrated=artifact(findings.calibrated),
        latencies=artifact(findings.latencies),
        exported=short(findings.exported),
        evaluations=short(dict(findings.evaluations)),
        benchmark=benchmark and benchmark.model_copy(update={"results": named(benchmark.results), "files": named(benchmark.files)}),
        close_up_lacks=short(findings.close_up_lacks),
        remarks=short(findings.remarks),
    )


def shown(text: str, folder: Path) -> str:
    """A whole path, as it is shown in the report of a run folder."""
    path = Path(text)
    if path.is_relative_to(folder.parent) and path != folder.parent and folder.parent.name:
        return path.relative_to(folder.parent).as_posix()
    return "/".join(("…", *path.parts[1:][-2:]))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts([key, item])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
