"""The documentation site builds without a warning, needs no network to be read, leads nowhere that is not there, and leaves nothing out."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer

import vitq
from vitq.cli.app import app

ROOT = Path(__file__).parents[1]
LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("object", "data")}
"""What a browser fetches by itself, as (tag, attribute)."""


class Page(HTMLParser):
    """The links, loaded resources, anchors and text of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = {""}
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name"):
                self.anchors.add(value or "")
            if (tag, name) in LOADED:
                self.loaded.append(value or "")
            if tag == "a" and name == "href":
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}


@pytest.mark.slow
def test_links_and_resources_are_there(site: Path, pages: dict[Path, Page]) -> None:
    missing = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else {unquote(parts.fragment)}
            if not target.is_file() or unquote(parts.fragment) not in anchors:
                missing.append(f"{path.relative_to(site)}: {link}")
    assert not missing, "\n".join(missing)


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert [link for page in pages.values() for link in page.loaded if urlsplit(link).netloc] == []
    for sheet in site.rglob("*.css"):
        assert "url(http" not in sheet.read_text(encoding="utf-8").replace('"', "").replace("'", ""), sheet


@pytest.mark.slow
def test_every_command_has_a_page_with_its_options(site: Path, pages: dict[Path, Page]) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    index = pages[site / "generated" / "commands" / "index.html"]
    for name, command in commands.items():
        page = pages[site / "generated" / "commands" / f"{name}.html"]
        assert f"{name}.html" in index.links
        for parameter in (found for found in command.params if not found.hidden):
            names = [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []
            for text in [*names, *(parameter.help or "").split("`")]:
                assert text.strip() in page.text, f"{name} {parameter.name}: {text}"


@pytest.mark.slow
def test_every_page_can_be_reached_and_every_schema_has_one(site: Path, pages: dict[Path, Page]) -> None:
    sources = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").glob("*.md")}
    sources |= {Path("generated/schemas") / f"{path.stem}.html" for path in (ROOT / "docs" / "schemas").glob("*.json")}
    seen, todo = set(), [site / "index.html"]
    while todo:
        path = todo.pop()
        if path in pages and path not in seen:
            seen.add(path)
            todo += [(path.parent / unquote(urlsplit(link).path)).resolve() for link in pages[path].links if not urlsplit(link).netloc]
    assert {path.relative_to(site) for path in seen} >= sources


@pytest.mark.slow
def test_the_python_page_has_every_public_name(site: Path, pages: dict[Path, Page]) -> None:
    anchors = pages[site / "api.html"].anchors
    assert {f"vitq.{name}" for name in vitq.__all__ if name != "__version__"} <= anchors
