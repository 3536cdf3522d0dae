"""The documentation: it loads nothing from elsewhere, and quotes the benchmarks as they are."""

import importlib.util
import re
import tomllib
from pathlib import Path

import jax
import pytest

import jaxgrad as jg

ROOT = Path(__file__).parent.parent


def offline():
    """The module `.ci/offline.py`, which the build of the documentation uses."""
    spec = importlib.util.spec_from_file_location("offline", ROOT / ".ci" / "offline.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://elsewhere.example/a.js"></script>',
        '<script src="//elsewhere.example/a.js"></script>',
        '<link rel="stylesheet" href="https://elsewhere.example/a.css">',
        '<link rel="preconnect" href="https://elsewhere.example">',
        '<img alt="" src="https://elsewhere.example/a.png">',
        '<img alt="" srcset="a.png 1x, https://elsewhere.example/a.png 2x">',
        '<style>@import url("https://elsewhere.example/a.css");</style>',
        '<p style="background: url(https://elsewhere.example/a.png)"></p>',
        '<script type="module">import a from "https://elsewhere.example/a.mjs"</script>',
        '<script>const a = await import("https://elsewhere.example/a.mjs")</script>',
        '<iframe src="http://elsewhere.example"></iframe>',
    ],
)
def test_a_page_that_loads_from_elsewhere_is_found(tmp_path, html):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "index.html").write_text(f"<body>{html}</body>")
    (fault,) = offline().faults(tmp_path)
    assert "elsewhere" in fault


def test_a_page_that_loads_a_missing_file_is_found(tmp_path):
    (tmp_path / "index.html").write_text('<img alt="" src="docs/gone.svg">')
    assert offline().faults(tmp_path) == ["index.html loads 'docs/gone.svg', which is not there"]


def test_an_absolute_path_is_found(tmp_path):
    (tmp_path / "a.js").write_text("")
    (tmp_path / "index.html").write_text('<script src="/a.js"></script>')
    assert offline().faults(tmp_path) == ["index.html loads /a.js by an absolute path"]


def test_a_style_sheet_that_loads_from_elsewhere_is_found(tmp_path):
    (tmp_path / "a.css").write_text("@import '//elsewhere.example/b.css';")
    assert offline().faults(tmp_path) == ["a.css loads //elsewhere.example/b.css"]


def test_links_and_what_comes_with_the_site_are_allowed(tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "a.js").write_text("")
    (tmp_path / "page" / "index.html").write_text(
        '<link rel="canonical" href="https://elsewhere.example/page/"><a href="https://elsewhere.example">a link</a>'
        '<script src="../a.js?v=1"></script><img alt="" src="data:image/png;base64,AA">'
        "<code>import a from 'https://elsewhere.example'</code>"
    )
    (tmp_path / "404.html").write_text('<script src="/a.js"></script>')
    assert offline().faults(tmp_path) == []


def tables(path):
    """Every row of every table in a Markdown file, as (header, cells)."""
    header, rows = None, []
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else None
        if cells is None:
            header = None
        elif header is None:
            header = cells
        elif not set("".join(cells)) <= set("-:"):
            rows.append((header, cells))
    return rows


def test_the_page_of_costs_quotes_the_benchmarks():
    benchmarked = {
        cells[0]: dict(zip(header, cells, strict=True))
        for name in ("transform", "deep", "compiled")
        for header, cells in tables(ROOT / "benchmarks" / f"{name}.md")
    }
    rows = tables(ROOT / "docs" / "cost.md")
    assert len(rows) == 9 + 3 + 19
    for header, cells in rows:
        quoted = dict(zip(header[2:], cells[2:], strict=True))
        assert quoted == {column: benchmarked[cells[1]][column] for column in quoted}, cells[1]


def test_the_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == jg.__version__
    policy = (ROOT / "docs" / "policy.md").read_text()
    jax_minimum = next(
        re.fullmatch(r"jax>=(.*)", line)[1] for line in project["dependencies"] if line.startswith("jax>=")
    )
    assert f"| JAX and jaxlib | {jax_minimum} and newer |" in policy
    assert f"| Python | {project['requires-python'].removeprefix('>=')} and newer |" in policy
    assert tuple(map(int, jax.__version__.split(".")[:2])) >= tuple(map(int, jax_minimum.split(".")))


def test_the_site_has_a_page_for_every_file_of_documentation():
    nav = (ROOT / "mkdocs.yml").read_text()
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert pages
    assert [page for page in pages if page not in nav] == []
