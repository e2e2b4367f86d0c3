"""The report as HTML: the sections put into the template, everything that comes from a file escaped."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vitq import __version__
from vitq.report.costs import SHADES
from vitq.report.findings import Findings, Lacking
from vitq.report.key_figures import key_figures
from vitq.report.sections import SECTIONS
from vitq.units import in_units

_LIBRARIES = ("torch", "timm", "onnx", "onnxruntime")


def lacking(findings: Findings) -> list[tuple[str, Lacking]]:
    """The titles of the sections that the report lacks, with what would bring them."""
    return [(title, found) for title, section in SECTIONS.values() if isinstance(found := section(findings), Lacking)]


def page(findings: Findings) -> tuple[str, list[str]]:
    """The whole report.

    Args:
        findings: what a run folder holds.

    Returns:
        The HTML and the names of the sections that it has.
    """
    built: dict[str, Any] = {name: section(findings) for name, (_, section) in SECTIONS.items()}
    titles = {name: title for name, (title, _) in SECTIONS.items()}
    sections = {name: None if isinstance(section, Lacking) else section for name, section in built.items()}
    # No extension decides: whatever is put into the page is escaped.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["units"] = in_units
    html = environment.get_template("report.html.jinja").render(
        **sections,
        folder=findings.folder,
        remarks=findings.remarks,
        figures=key_figures(sections),
        titles=titles,
        lacking=[(titles[name], section) for name, section in built.items() if isinstance(section, Lacking)],
        shades=range(SHADES),
        versions={"vitq": __version__, **{name: found for name in _LIBRARIES if (found := _version(name))}},
    )
    return html, [name for name, section in sections.items() if section is not None]


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
