"""The words of a command line: what several commands take, and the types that argparse does not know."""

from __future__ import annotations

import argparse
import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from prime_fast.config import Config, DataConfig, RewardConfig, RolloutConfig, load_config, parse_assignments
from prime_fast.rewards.pool import SANDBOXES

if TYPE_CHECKING:
    from prime_fast.evaluation.settings import Settings

OPTION = re.compile(r"-[^\d.]")  # not a negative number
ASSIGNMENT = re.compile(r"[\w.]+=")


class Command(argparse.ArgumentParser):
    """Takes words and options in any order. argparse alone fills a list of words from one run of them and, before
    Python 3.12.7, leaves it empty where an option comes first."""

    words: str | None = None  # the list that takes what argparse could not place

    def parse_known_args(self, args=None, namespace=None):
        for name in (word.partition("=")[0] for word in args if OPTION.match(word)):
            if not any(known.startswith(name) for known in self._option_string_actions):
                near = get_close_matches(name, self._option_string_actions, n=1)
                self.error(f"unknown option {name}" + "".join(f"; did you mean {known}?" for known in near))
        options, rest = super().parse_known_args(args, namespace)
        if self.words is None:
            return options, rest
        setattr(options, self.words, getattr(options, self.words) + rest)
        return options, []


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text} is no JSON object such as {{"enable_thinking": false}}')
    return value


def takes_reward(command: argparse.ArgumentParser) -> None:
    default = RewardConfig()
    command.add_argument("--reward", default=default.function, help="math, code, auto, or file.py:function")
    command.add_argument("--timeout", type=float, default=default.timeout, metavar="S", help="seconds a response")
    command.add_argument("--sandbox", choices=SANDBOXES, default=SANDBOXES[0], help="of model-written code")


def samples_responses(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="run_dir, RUN_DIR/checkpoints/best, model directory or hub id")
    engines = get_args(RolloutConfig.model_fields["engine"].annotation)
    command.add_argument("--engine", choices=engines, default=engines[0])
    command.add_argument("--vllm", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of vllm.LLM")
    command.add_argument("--temperature", type=float, help="of the samples (default: 1; --preset paper: 0.3)")
    command.add_argument("--max-response", type=count, metavar="N", help="tokens (default: 3072, or the preset's)")
    command.add_argument("--limit", type=count, metavar="N", help="only the first N rows of each file")
    takes_template(command)
    command.add_argument("--batch", type=count, default=64, metavar="N", help="responses generated together")
    command.add_argument("--seed", type=int, default=0)


def takes_template(command: argparse.ArgumentParser) -> None:
    templates = get_args(DataConfig.model_fields["template"].annotation)
    command.add_argument("--template", choices=templates, default=templates[0], help="as data.template in training")
    command.add_argument("--template-args", type=json_object, default={}, metavar="JSON", help="of the chat template")


def settings_of(options: argparse.Namespace, out: Path) -> Settings:
    """What was asked of an evaluation, or of rollouts. out: where it goes unless --out says so."""
    from prime_fast.evaluation.settings import Settings

    given = {key: value for key, value in vars(options).items() if key in Settings.__dataclass_fields__}
    given |= {"data": tuple(options.data), "out": Path(options.out or out)}
    given["vllm"] = parse_assignments(options.vllm)
    return Settings(**given)


def resumes(command: argparse.ArgumentParser) -> None:
    command.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of run_dir")
    command.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="PARTS",
        help="go on with --resume though these are others now: data, models, tokenizer, reward, packages",
    )


def takes_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="YAML file, e.g. configs/quickstart.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, YAML values")
    command.words = "overrides"


def config_of(options: argparse.Namespace) -> Config:
    """CONFIG is the first word that is no key=value, wherever it stands."""
    words = [options.config, *options.overrides]
    config = next((word for word in words if not ASSIGNMENT.match(word)), None)
    if config is None:
        raise ValueError(f"{options.config} is no CONFIG; give a YAML file such as configs/quickstart.yaml as well")
    words.remove(config)
    return load_config(config, words)
