"""docs/: pages that are written from something else are what that gives today."""

from pathlib import Path

from prime_fast.config import known_keys, page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_settings_are_the_sources():
    text = (DOCS / "settings.md").read_text()
    assert text == page.page(), "python -m prime_fast.config.page > docs/settings.md"
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert {row[0].strip("| `") for row in rows} == set(known_keys())
    assert not [row[0] for row in rows if not row[-1].strip("| ")], "a key without a comment above or beside it"
