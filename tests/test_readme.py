"""The commands of the README, of docs/ and of the configs' comments, as they are written: each is parsed by the program
it calls, and what is cheap is run."""

import argparse
import json
import random
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import processes
import pytest
import torch
import yaml
from pip._internal.commands import create_command as pip_command
from torch.distributed.run import get_args_parser as torchrun_parser

import prime_kernels
from prime_fast import cli
from prime_fast.cli.words import config_of
from prime_fast.rewards.attacks import ATTACKS

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
PROGRAM = re.compile(r"(?:make|prime-fast|python|torchrun|pip|source) ")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def commands(path: Path) -> list[str]:
    """Of a text: its ```sh blocks line by line, and what is `like this` and starts as a program does. Of a config: the
    same in its comments, and each comment's line that starts as a program does."""
    text = path.read_text()
    if path.suffix == ".yaml":
        text = "\n".join(re.findall(r"^#\s*(.*)$", text, re.M))
        found = [line for line in text.splitlines() if PROGRAM.match(line)]
    else:
        found = [line for kind, block in BLOCK.findall(text) if kind == "sh" for line in block.splitlines()]
        text = BLOCK.sub("", text)
    return [line for line in found if line.strip()] + [
        span for span in re.findall(r"`([^`]+)`", text) if PROGRAM.match(span)
    ]


COMMANDS = {(path, command): None for path in (*TEXTS, *CONFIGS) for command in commands(path)}
README = [command for path, command in COMMANDS if path == TEXTS[0]]


def prime_fast(command: str) -> list[str] | None:
    """The arguments this command gives to prime-fast; None if it calls something else."""
    words = shlex.split(command, comments=True)
    if words[0] == "torchrun":
        options = torchrun_parser().parse_args(words[1:])
        return (
            options.training_script_args if (options.module, options.training_script) == (True, "prime_fast") else None
        )
    if words[:3] == ["python", "-m", "prime_fast"]:
        return words[3:]
    return words[1:] if words[0] == "prime-fast" else None


class Parsed(Exception):
    pass


@pytest.fixture
def parsing(monkeypatch):
    """Runs a module or script up to the moment when it has parsed these arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(*arguments, **options):
        parse(*arguments, **options)
        raise Parsed

    def run(start, name: str, arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Parsed):
            start(name, run_name="__main__")

    return run


def test_commands_are_found():
    assert len(README) > 15 and len(COMMANDS) > 50
    for text in TEXTS:
        kinds = {kind for kind, _ in BLOCK.findall(text.read_text())}
        assert kinds <= {"sh", "python", "text", "yaml", "json", "math", "diff"}, (
            f"{text.name}: a block that does not say what it holds"
        )


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=lambda part: getattr(part, "stem", part))
def test_command_parses(path, command, parsing, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = prime_fast(command)
    words = shlex.split(command, comments=True)
    if arguments is not None:
        try:
            options = cli.parser().parse_args(arguments)
        except SystemExit as end:
            assert "--version" in arguments and end.code == 0, f"{command} does not parse"
            return
        if arguments[0] in ("train", "sft", "prm") and not options.config.startswith("runs/"):
            config_of(options)  # its file, and the keys set beside it
    elif words[0] == "make":
        result = processes.run(["make", "-n", *words[1:]], cwd=ROOT)
        assert result.returncode == 0, result.stderr
    elif words[:2] == ["python", "-m"]:
        parsing(runpy.run_module, words[2], words[3:])
    elif words[0] == "python":
        parsing(runpy.run_path, words[1], words[2:])
    elif words[0] == "pip":
        pip_command(words[1]).parse_args(words[2:])
    else:
        assert words == ["source", ".venv/bin/activate"]
        assert re.search(r"^VENV \?= \.venv$", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("command", [command for _, command in COMMANDS if "--dry-run" in command])
def test_dry_runs(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main(prime_fast(command)) == 0
    assert len(capsys.readouterr().out.splitlines()) > 10


@pytest.fixture
def stand_in(workspace, tmp_path, monkeypatch) -> Path:
    """A folder that has what the README's commands read, tiny: model, rows, responses, and the GSM8K config's file."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workspace / "model", tmp_path / "models/smollm2-135m-instruct")
    config = yaml.safe_load((workspace / "config.yaml").read_text()) | {"run_dir": "runs/smollm2-gsm8k"}
    for key in ("policy", "prm"):
        config[key].pop("lr", None)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/smollm2-gsm8k.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"question": f"1+{n}?", "answer": n + 1}) + "\n" for n in range(3))
    )
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(f"\\boxed{{{n + 1}}}") + "\n" for n in range(3)))
    return tmp_path


def test_the_readmes_runs_in_its_order(stand_in, capsys):
    """SFT, PRIME, its continuation, the report and the score, word for word, on a tiny model."""
    starts = r"prime-fast (sft configs/smollm2|train configs/smollm2|train runs/|report|score)"
    cheap = [line for line in README if re.match(starts, line)]
    assert len(cheap) == 5
    for line in cheap:
        if " report " in line:
            for run in ("runs/a", "runs/b"):
                shutil.copytree("runs/smollm2-gsm8k", run)
        assert cli.main(prime_fast(line)) == 0, line
    printed = capsys.readouterr().out
    assert "model: runs/smollm2-gsm8k/checkpoints" in printed and "curves: " in printed and "3 score 1" in printed


def test_the_readmes_python(capsys):
    """On random tensors of fitting shapes, with the names it leaves open."""
    draw = torch.Generator().manual_seed(random.randrange(1 << 30))
    lengths = torch.tensor([3, 5, 2, 6])
    tokens, size, vocabulary = int(lengths.sum()), 8, 23
    names = {
        "hidden": torch.randn(tokens, size, generator=draw),
        "lm_head": torch.nn.Linear(size, vocabulary, bias=False),
        "targets": torch.randint(vocabulary, (tokens,), generator=draw),
        "advantage": torch.randn(tokens, generator=draw),
        "token_weight": torch.full((tokens,), 1 / tokens),
        "cu_seqlens": torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        "outcome": torch.tensor([1.0, 0.0, 0.0, 1.0]),
        "group": torch.tensor([0, 0, 1, 1]),
    }
    names |= {name: -torch.rand(tokens, generator=draw) for name in ("old_logprob", "ref_logprob", "prm_logprob")}
    (code,) = [block for kind, block in BLOCK.findall(TEXTS[0].read_text()) if kind == "python"]
    exec(code, names)
    assert names["logprob"].shape == names["adv"].advantage.shape == (tokens,) and names["out"].score.shape == (4,)
    assert set(prime_kernels.last_used) >= {
        "linear_logprob",
        "linear_policy_loss",
        "linear_prm_loss",
        "prime_advantage",
    }


def test_what_the_readme_points_to_exists():
    text = TEXTS[0].read_text()
    local = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = re.findall(r"`((?:scripts|configs|prime_fast|tests|benchmarks|kernels)/[\w./-]+)`", text)
    assert len(local) > 5 and not [name for name in local + named if not (ROOT / name).exists()]
    assert f"tries {len(ATTACKS)} ways out" in text
    assert f"prime_fast-{prime_kernels.__version__}-*.whl" in (ROOT / "docs/kernels.md").read_text()


def test_the_readmes_layout_is_the_trees():
    (layout,) = [block for kind, block in BLOCK.findall(TEXTS[0].read_text()) if kind == "text"]
    for line in layout.splitlines():
        place = ROOT / "prime_fast" if line.startswith(" ") else ROOT
        names = re.findall(r"(?:^ *|   |; )([a-z_]+/)", line)
        inside = place / names[0] if place == ROOT else place
        assert names and not [name for name in names if not any((at / name).is_dir() for at in (place, inside, ROOT))]
        assert not [
            name
            for name in re.findall(r"\w+\.py", line)
            if not (inside / name).exists() and not [*inside.glob(f"*/{name}")]
        ]
