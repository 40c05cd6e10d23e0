"""Whatever stands behind whatever key, in a file or on the command line: it is taken, or refused in one sentence."""

import datetime
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from prime_fast import yaml_text
from prime_fast.cli import main
from prime_fast.config import Config, known_keys, load_config, make_config

CYCLE: list = []
CYCLE.append(CYCLE)
KEYS = known_keys()
SECTIONS = [name for name, field in Config.model_fields.items() if hasattr(field.annotation, "model_fields")]
NUMBERS = [-1, 0, 1, 2, 1 << 31, 1 << 70, -(1 << 70), 10**400, 0.5, 1.0, -0.0, 1e-320, 1e308, math.nan, math.inf]
TEXTS = ["", " ", "x", "1e-4", "nan", "-inf", "1_0", "yes", "~", "a/b", "a\0b", "a\nb", "\ud800", "\u2028", "é" * 9]
TEXTS += ["x" * 300, "x/" * 3000, "..", "/dev/null", "/dev/null/x", "{", "{0}", "{solution.x}", "{solution:>9}", "a:b"]
TEXTS += ["x.py:", ":", "math:nothing", "os:getcwd", "2024-01-01", "1:30", "!!python/object:os.system"]
OTHERS = [None, True, False, [], [1], [None], ["x"], [[]], [0.1, 0.9], [0.9, 0.1], [1, 2, 3], CYCLE, {}, {"a": 1}]
OTHERS += [
    {1: 2},
    {"a": {"b": [1, None]}},
    {"a": math.nan},
    {"a": {"b": CYCLE}},
    {"": 1},
    {"messages": 1},
    {"gpus": "x"},
]
OTHERS += [
    {"gpus": [-1]},
    {"bucket_mib": "x"},
    {"sleep_level": 7},
    {"tensor_parallel_size": 0},
    {"gpu_memory_utilization": "x"},
    {"kv_cache_memory_bytes": "x"},
    b"x",
    b"\xff",
    {1},
    (),
]
OTHERS += [datetime.date(2024, 1, 1), {"a": datetime.date(2024, 1, 1)}, {"a": "\ud800"}, object(), {"a": b"\xff"}]
VALUES = [*NUMBERS, *TEXTS, *OTHERS]


def tree_with(key: str, value: object) -> dict:
    tree = {"run_dir": "out", "model": {"policy": "some/model"}}
    *parents, leaf = key.split(".")
    branch = tree
    for parent in parents:
        branch = branch.setdefault(parent, {})
    branch[leaf] = value
    return tree


def in_one_sentence(message: str) -> bool:
    return bool(message) and "\n" not in message and len(message) < 2000


@pytest.mark.parametrize("key", [*KEYS, *SECTIONS, "nothing", "model.nothing", "a\nb", ""])
def test_any_value_is_taken_or_refused(key):
    for value in VALUES:
        try:
            config = make_config(tree_with(key, value), "config.yaml: ")
        except ValueError as error:
            assert type(error) is ValueError and in_one_sentence(str(error)), (value, error)
            continue
        dumped = config.model_dump(mode="json")
        part = {name: dumped[name] for name in ("run_dir", "model", key.partition(".")[0])}
        assert make_config(yaml_text.read(yaml_text.write(part))) == config, value


FUZZ = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=[Phase.generate])
PIECES = [
    "{",
    "}",
    "[",
    "]",
    ":",
    ": ",
    ",",
    "- ",
    "&a ",
    "*a",
    "<<: ",
    "!!int ",
    "!x",
    "|",
    ">",
    "#",
    "?",
    "'",
    '"',
    "%",
]
PIECES += [
    "\n",
    "\n  ",
    "\t",
    "\0",
    "\ufeff",
    "=",
    "@",
    "1e5",
    "0x1f",
    "0o7",
    "2024-99-99",
    "1:2:3",
    ".nan",
    "null",
    "true",
]
PIECES += ["run_dir: x", "model: {policy: y}", "seed", "9" * 5000, "[" * 2000, "policy", ".", "é"]
yaml_texts = st.one_of(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.text(max_size=12))


@settings(FUZZ, max_examples=150)
@given(content=st.one_of(yaml_texts.map(str.encode), st.binary(max_size=40)))
def test_any_file_is_taken_or_refused(content, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(load_config(path), Config)
    except ValueError as error:
        assert type(error) is ValueError and in_one_sentence(str(error)), error


def outcome(capsys, *words: str) -> tuple[int, str]:
    """Exit code and what stands on stderr."""
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err.strip()


@settings(FUZZ, max_examples=40)
@given(word=st.one_of(yaml_texts, st.tuples(st.sampled_from([*KEYS, *SECTIONS]), yaml_texts).map("=".join)))
def test_any_word_on_the_command_line_ends_in_a_dry_run_or_a_sentence(word, workspace, capsys):
    code, said = outcome(capsys, "train", str(workspace / "config.yaml"), "--dry-run", word)
    assert code == 0 or (code == 2 and in_one_sentence(said.splitlines()[-1])), (code, said)


@pytest.mark.parametrize("words", [["engine.micro_tokens=2147483647"], ["rollout.vllm.tensor_parallel_size=1024"]])
def test_the_largest_values_have_a_dry_run_too(words, workspace, capsys):
    """The search for a setting that mends them once took a step for every 1024 tokens, with a plan each."""
    config = str(workspace / "config.yaml")
    for card in ("1", "h200"):
        code, _ = outcome(capsys, "train", config, "--dry-run", "--gpu", card, "rollout.engine=vllm", *words)
        assert code in (0, 1)


class Started(Exception):
    """All inputs were taken; the models would be loaded now."""


@pytest.mark.parametrize(
    "key", ["model.policy", "model.prm", "data.train", "data.eval", "data.template_args", "run_dir"]
)
def test_a_start_before_any_model_is_loaded(key, workspace, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("prime_fast.trainer.Trainer", lambda *_: (_ for _ in ()).throw(Started))
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("[]")
    texts = [
        "x",
        "a/b",
        "..",
        "/dev/null",
        "/dev/null/x",
        "/proc/x",
        "{a: 1}",
        "{tokenize: true}",
        "{'': 1}",
        "{messages: 1}",
    ]
    texts += [str(tmp_path / name) for name in ("file", "file/x", "folder.jsonl", "model", "model/config.json")]
    for text in texts[-5:] if key == "model.prm" else texts:  # read as model.policy is
        words = ["train", str(workspace / "config.yaml"), f"run_dir={tmp_path}/run", f"{key}={text}"]
        try:
            code, said = outcome(capsys, *words)
        except Started:
            assert key != "run_dir" or not Path(text).is_file() and not Path(text).parent.is_file(), text
            continue
        assert code == 2 and in_one_sentence(said.splitlines()[-1]), (text, code, said)
    assert not (tmp_path / "run").exists()
