"""The words of a command line: what several commands take, and the types that argparse does not know."""

from __future__ import annotations

import argparse
import json
import re
from difflib import get_close_matches

from prime_fast.config import Config, RewardConfig, load_config
from prime_fast.rewards.pool import SANDBOXES

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
