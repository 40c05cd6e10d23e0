"""docs/: pages that are written from something else are what that gives today, and figures are those of their source."""

import ast
import re
from pathlib import Path

import pytest

from benchmarks.measured import __main__ as measured
from prime_fast.config import known_keys, page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TEXTS = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
CODE = re.compile(r"`[^`]*`")
FIGURE = re.compile(r"(?<![\w.-])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")  # no part of a name: SmolLM2-135M, float64


def words(text: str) -> str:
    """Without code, and without where links lead."""
    return re.sub(r"\]\([^)]*\)", "]", CODE.sub("", text))


def test_settings_are_the_sources():
    text = (DOCS / "settings.md").read_text()
    assert text == page.page(), "python -m prime_fast.config.page > docs/settings.md"
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert {row[0].strip("| `") for row in rows} == set(known_keys())
    assert not [row[0] for row in rows if not row[-1].strip("| ")], "a key without a comment above or beside it"


def test_measured_figures_are_the_results():
    assert (DOCS / "measured.md").read_text() == measured.page(), "python -m benchmarks.measured > docs/measured.md"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/measured").glob("*.py")), ids=lambda path: path.stem)
def test_no_figure_is_typed(path):
    """What stands around the figures of an f-string holds none."""
    strings = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.JoinedStr)]
    for string in strings:
        typed = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in string.values)
        assert not FIGURE.findall(words(typed)), f"{path.name}, line {string.lineno}: {typed}"


def sections() -> dict[str, str]:
    """Of docs/measured.md: {anchor: text}."""
    parts = re.split(r"^## (.*)$", (DOCS / "measured.md").read_text(), flags=re.M)[1:]
    return {title.lower().replace(" ", "-"): text for title, text in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_figures_elsewhere_are_of_the_section_they_link_to(path):
    """A paragraph, an item or a row of a table that links to a section of docs/measured.md has no figures but its."""
    found = sections()
    for part in re.split(r"\n\n+|\n(?=[*|] )", path.read_text()):
        anchors = re.findall(r"measured\.md#([\w-]+)\)", part)
        if anchors and path.name != "measured.md":
            known = {figure for anchor in anchors for figure in FIGURE.findall(words(found[anchor]))}
            assert not set(FIGURE.findall(words(part))) - known, part
