"""docs/ and README: links lead somewhere, what is quoted is said, examples run, figures are those of their source."""

import ast
import inspect
import re
import shlex
import tokenize
from functools import cache
from pathlib import Path

import pytest

import prime_kernels
from benchmarks.measured import page as measured
from prime_fast import cli
from prime_fast.config import known_keys
from prime_fast.config import page as settings
from prime_fast.rewards.functions import load_reward

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TEXTS = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
CODE = re.compile(r"`[^`]*`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FIGURE = re.compile(r"(?<![\w.-])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")  # no part of a name: SmolLM2-135M, float64
SECTIONS = "model|data|rollout|reward|prime|policy|prm|sft|engine|watch|log"
of_each_text = pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)


def prose(text: str) -> str:
    return CODE.sub("", BLOCK.sub("", text))


def words(text: str) -> str:
    """Without code, and without where links lead."""
    return LINK.sub("]", CODE.sub("", text))


@cache
def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@of_each_text
def test_links_lead_somewhere(path):
    """To files and folders of the tree, and to headings."""
    dead = []
    for link in LINK.findall(prose(path.read_text())):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


def test_the_readme_leads_to_every_page():
    linked = {link.partition("#")[0] for link in LINK.findall(TEXTS[0].read_text())}
    assert not {f"docs/{path.name}" for path in TEXTS[1:]} - linked


@of_each_text
def test_what_is_named_is_there(path):
    """Settings, files and tests in `code`."""
    spans = " ".join(CODE.findall(BLOCK.sub("", path.read_text())))
    keys = {part for key in known_keys() for part in (key, key.rpartition(".")[0])}
    keys |= {*re.findall(r"rollout\.vllm\.\w+", spans)}
    if path.name == "verl.md":  # theirs
        keys |= set(re.findall(r"data\.\w+", (ROOT / "prime_fast/integrations/verl.py").read_text()))
    files = {path.name for path in ROOT.glob("prime_fast/**/*.py")}
    named = re.findall(rf"(?<![\w./-])(?:{SECTIONS})\.[a-z]\w*", spans)
    assert not {name for name in named if name not in keys and name not in files}
    paths = re.findall(
        r"(?<![\w./-])(?:prime_fast|kernels|tests|benchmarks|configs|examples|scripts)/[\w./-]*\w", spans
    )
    assert not [name for name in paths if not (ROOT / name).exists()]
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", spans):
        assert f"def {name}(" in (ROOT / file).read_text(), name


# ---- pages that are written from something else


def test_settings_are_the_sources():
    text = (DOCS / "settings.md").read_text()
    assert text == settings.page(), "python -m prime_fast.config docs/settings.md"
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert {row[0].strip("| `") for row in rows} == set(known_keys())
    assert not [row[0] for row in rows if not row[-1].strip("| ")], "a key without a comment above or beside it"


def test_measured_figures_are_the_results():
    assert (DOCS / "measured.md").read_text() == measured.page(), "python -m benchmarks.measured docs/measured.md"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/measured").glob("*.py")), ids=lambda path: path.stem)
def test_no_figure_is_typed(path):
    """What stands around the figures of an f-string holds none."""
    strings = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.JoinedStr)]
    for string in strings:
        typed = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in string.values)
        assert not FIGURE.findall(words(typed)), f"{path.name}, line {string.lineno}: {typed}"


@of_each_text
def test_figures_elsewhere_are_of_the_section_they_link_to(path):
    """A paragraph, an item or a row of a table that links to a section of docs/measured.md has no figures but its."""
    parts = re.split(r"^## (.*)$", (DOCS / "measured.md").read_text(), flags=re.M)[1:]
    found = {title.lower().replace(" ", "-"): text for title, text in zip(parts[::2], parts[1::2], strict=True)}
    for part in re.split(r"\n\n+|\n(?=[*|] )", path.read_text()):
        sections = re.findall(r"measured\.md#([\w-]+)\)", part)
        if sections:
            known = {figure for section in sections for figure in FIGURE.findall(words(found[section]))}
            assert not set(FIGURE.findall(words(part))) - known, part


# ---- pages that quote


@cache
def said() -> list[str]:
    """Every text in the sources of prime_fast; of f-strings what stands between the values."""
    texts = []
    for path in ROOT.glob("prime_fast/**/*.py"):
        with tokenize.open(path) as file:
            tree = ast.parse(file.read())
        texts += [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    return texts


def test_quoted_sentences_are_said():
    quotes = [block for kind, block in BLOCK.findall((DOCS / "troubleshooting.md").read_text()) if kind == "text"]
    parts = [part.strip() for quote in quotes for line in quote.splitlines() for part in line.split("...")]
    parts = [part for part in parts if len(part) > 3]
    assert len(quotes) > 20 and not [part for part in parts if not any(part in text for text in said())]


PLANNED = re.findall(r"^\| `(configs/.*)` \| ([\d.]+) s \| (.*) \|$", (DOCS / "scaling.md").read_text(), re.M)


@pytest.mark.parametrize(("arguments", "seconds", "tightest"), PLANNED, ids=[row[0] for row in PLANNED])
def test_the_plan_says_what_scaling_says(arguments, seconds, tightest, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = cli.main(["train", *shlex.split(arguments), "--dry-run"])
    printed = " ".join(capsys.readouterr().out.split())
    assert f" of {seconds} s" in printed and f"Tightest phase: {tightest}." in printed
    assert code == ("does not fit" in tightest)


def test_scaling_has_its_table():
    assert len(PLANNED) > 5


# ---- pages with code


def python_of(name: str) -> list[str]:
    return [block for kind, block in BLOCK.findall((DOCS / name).read_text()) if kind == "python"]


def test_kernels_examples_run():
    names = {}
    for block in python_of("kernels.md"):
        exec(block, names)
    assert {"linear_logprob", "linear_policy_loss", "linear_prm_loss", "prime_advantage"} <= set(
        prime_kernels.last_used
    )


def test_kernels_signatures_are_the_ops():
    lines = re.findall(r"^`(\w+)\((.*)\)`$", (DOCS / "kernels.md").read_text(), re.M)
    assert [name for name, _ in lines] == [
        name for name in prime_kernels.__all__ if "_" in name and name != "last_used"
    ]
    for name, written in lines:
        parameters = inspect.signature(getattr(prime_kernels, name)).parameters.values()
        told = [str(p.replace(annotation=p.empty)).replace("'", '"') for p in parameters]
        told.insert(next(i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), "*")
        assert written == ", ".join(told)


@pytest.mark.parametrize(("name", "response", "outcome"), [("start.md", "It is 4", 1), ("extending.md", "It is 5", 0)])
def test_example_rewards_score(name, response, outcome, tmp_path):
    row = {"prompt": "2 + 2?", "data_source": "here", "answer": 4, "reward_model": {"ground_truth": 4}}
    for number, block in enumerate(python_of(name)):
        file = tmp_path / f"reward_{Path(name).stem}_{number}.py"
        file.write_text(block)
        (function,) = re.findall(r"^def (\w+)", block, re.M)
        assert load_reward(f"{file}:{function}")(response, row) == outcome
