"""prime-fast from the command line. A user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

from rich.console import Console

from prime_fast import durable
from prime_fast.config import (
    Config,
    DataConfig,
    RewardConfig,
    RolloutConfig,
    load_config,
    parse_assignments,
    save_config,
)
from prime_fast.data.shapes import WHERE
from prime_fast.progress import lasting_output, progress, say
from prime_fast.rewards.pool import SANDBOXES

if TYPE_CHECKING:
    from prime_fast.metrics import MetricsLog
    from prime_fast.stages.sft import Sft
    from prime_fast.trainer import Trainer

T = TypeVar("T")
SCORE_ROWS = 4096  # graded at a time
OPTION = re.compile(r"-[^\d.]")  # not a negative number
ASSIGNMENT = re.compile(r"[\w.]+=")


def main(arguments: Sequence[str] | None = None) -> int:
    with lasting_output():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, FileNotFoundError) as error:
        if not _is_ours(error):
            raise
        say(f"prime-fast: {error}", sys.stderr)
        return 2
    except RuntimeError as error:
        from prime_fast.engine.distributed import Stop

        if not isinstance(error, Stop):
            raise
        say(f"prime-fast: {error}", sys.stderr)
        return error.code


def _is_ours(error: Exception) -> bool:
    """Whether our own code raised it, so that its message is the sentence for the user; else the traceback matters."""
    import prime_kernels

    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    homes = [Path(package).parent for package in (__file__, prime_kernels.__file__)]
    return any(Path(frame.tb_frame.f_code.co_filename).is_relative_to(home) for home in homes)


class _Command(argparse.ArgumentParser):
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


class _Version(argparse.Action):
    def __call__(self, parser, *_) -> None:
        from prime_fast import __version__  # loads torch

        print(f"prime-fast {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prime-fast", description=__doc__)
    parser.add_argument("--version", action=_Version, nargs=0, dest=argparse.SUPPRESS, help="print it and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Command)

    train = commands.add_parser("train", help="run PRIME")
    _takes_config(train)
    _resumes(train)
    train.add_argument("--dry-run", action="store_true", help="print model sizes, memory plan and passes; needs no GPU")
    train.add_argument("--ranks", type=_count, help="number of GPUs the dry run plans for (default: WORLD_SIZE or 1)")
    train.add_argument(
        "--gpu", help="compare the dry run with a100-80, a100-40, h100, h200 or a number of GiB; exit code 1: too small"
    )
    train.add_argument(
        "--response-tokens", type=_count, metavar="N", help="mean length for the seconds that the dry run predicts"
    )
    train.add_argument("--rates", metavar="PATH", help="measured rates for these: a folder of `make gpu`, or a JSON")
    train.add_argument(
        "--profile",
        type=_profiled_step,
        nargs="?",
        const=0,
        metavar="N",
        help="profile step N (default: the third) into RUN_DIR/profile: a trace, and a table of where the time goes",
    )
    train.set_defaults(run=_train)

    sft = commands.add_parser("sft", help="supervised warm start on worked solutions; writes RUN_DIR/model")
    _takes_config(sft)
    _resumes(sft)
    sft.set_defaults(run=_sft)

    _add_eval(commands.add_parser("eval", help="accuracy on files of rows, with intervals; best-of-n with a PRM"))
    _add_score(commands.add_parser("score", help="outcomes of given responses, by the trainer's reward code"))

    report = commands.add_parser("report", help="draw the curves of one or several runs and print their table")
    report.add_argument("runs", nargs="+", metavar="RUN_DIR")
    report.words = "runs"
    report.add_argument("--out", help="path of the picture (default: report/curves.png in the first run)")
    report.set_defaults(run=_report)

    doctor = commands.add_parser("doctor", help="what this machine has and lacks; tries to escape from the sandbox")
    doctor.add_argument("--quick", action="store_true", help="without the attempts to escape")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    doctor.add_argument("--run-dir", default="runs", metavar="DIR", help="whose disk is looked at (default: runs)")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_eval(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="run_dir, RUN_DIR/checkpoints/best, model directory or hub id")
    command.add_argument("--data", nargs="+", required=True, metavar="ROWS", help="files of rows, one benchmark each")
    command.add_argument("--out", help="directory of the results (default: runs/eval/ and the model's name)")
    engines = get_args(RolloutConfig.model_fields["engine"].annotation)
    command.add_argument("--engine", choices=engines, default=engines[0])
    command.add_argument("--vllm", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of vllm.LLM")
    command.add_argument(
        "--against", metavar="OTHER", help="compare, paired by problem, with this model or directory of an evaluation"
    )
    command.add_argument("--samples", type=_count, default=0, metavar="K", help="also draw K samples: avg@K, pass@K")
    command.add_argument("--temperature", type=float, help="of the samples (default: 1; --preset paper: 0.3)")
    command.add_argument("--max-response", type=_count, metavar="N", help="tokens (default: 3072, or the preset's)")
    command.add_argument("--limit", type=_count, metavar="N", help="only the first N rows of each file")
    templates = get_args(DataConfig.model_fields["template"].annotation)
    command.add_argument("--template", choices=templates, default=templates[0], help="as data.template in training")
    command.add_argument("--template-args", type=_json_object, default={}, metavar="JSON", help="of the chat template")
    command.add_argument("--preset", choices=["paper"], help="4096 tokens; 8192 for MATH-500, LeetCode, LiveCodeBench")
    command.add_argument(
        "--prm", help="best-of-n of the samples by this implicit PRM (a run_dir or checkpoint will do)"
    )
    command.add_argument("--reference", help="the PRM's reference model")
    command.add_argument("--batch", type=_count, default=64, metavar="N", help="responses generated together")
    command.add_argument("--seed", type=int, default=0)
    _takes_reward(command)
    command.set_defaults(run=_eval)


def _add_score(command: argparse.ArgumentParser) -> None:
    command.add_argument("rows", metavar="ROWS", help=".jsonl, .json or .parquet file of rows")
    command.add_argument("--responses", required=True, metavar="FILE", help="JSON lines in the order of the rows")
    command.add_argument("--workers", type=_count, metavar="N", help="processes (default: one a core, at most 16)")
    command.add_argument("--out", metavar="FILE", help="write the outcomes as JSON lines")
    _takes_reward(command)
    command.set_defaults(run=_score)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def _profiled_step(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no step to profile; give a number, or put --profile after CONFIG")
    return int(text)


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text} is no JSON object such as {{"enable_thinking": false}}')
    return value


def _takes_reward(command: argparse.ArgumentParser) -> None:
    default = RewardConfig()
    command.add_argument("--reward", default=default.function, help="math, code, auto, or file.py:function")
    command.add_argument("--timeout", type=float, default=default.timeout, metavar="S", help="seconds a response")
    command.add_argument("--sandbox", choices=SANDBOXES, default=SANDBOXES[0], help="of model-written code")


def _resumes(command: argparse.ArgumentParser) -> None:
    command.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of run_dir")
    command.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="PARTS",
        help="go on with --resume though these are others now: data, models, tokenizer, reward, packages",
    )


def _takes_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="YAML file, e.g. configs/quickstart.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, YAML values")
    command.words = "overrides"


def _config(options: argparse.Namespace) -> Config:
    """CONFIG is the first word that is no key=value, wherever it stands."""
    words = [options.config, *options.overrides]
    config = next((word for word in words if not ASSIGNMENT.match(word)), None)
    if config is None:
        raise ValueError(f"{options.config} is no CONFIG; give a YAML file such as configs/quickstart.yaml as well")
    words.remove(config)
    return load_config(config, words)


def _train(options: argparse.Namespace) -> int:
    config = _config(options)
    if options.gpu and not options.dry_run:
        raise ValueError("--gpu compares a dry run with a card; add --dry-run, or leave --gpu away")
    for name in ("response_tokens", "rates"):
        if getattr(options, name) and not options.gpu:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is for the seconds that a dry run predicts of a card; add --dry-run --gpu h200")
    if options.profile is not None and options.dry_run:
        raise ValueError("--profile needs steps, and a dry run makes none; leave one of the two away")
    if options.dry_run:
        from prime_fast.views.plan import print_dry_run

        ranks = options.ranks or int(os.environ.get("WORLD_SIZE", "1"))
        fits = print_dry_run(config, ranks, Console(), options.gpu, options.response_tokens, options.rates)
        return 0 if fits else 1
    profile = None
    if options.profile is not None:
        from prime_fast.profile import Profile

        profile = Profile(config.run_dir, config.steps, options.profile or None)
    newest, accepted = _prepare_run_dir(config, options)

    from prime_fast import preflight, resume
    from prime_fast.engine import distributed, zero
    from prime_fast.engine.checkpoint import intact, latest
    from prime_fast.trainer import Trainer

    device = zero.start(config.log.hang)
    newest = _together(lambda: newest and intact(Path(config.run_dir)))

    def check() -> tuple[dict, set[str]]:
        """On one rank of each machine: its identity, and what of it is not as it was in the newest checkpoint."""
        if distributed.local_rank() > 0:
            return {}, set()
        known = preflight.identify(config, inputs)
        return known, resume.check(newest, known, accepted) if newest else set()

    inputs = _together(lambda: preflight.load_inputs(config))
    known, renewed = distributed.gather_lists([_together(check)])[0]
    trainer = Trainer(config, device, replace(inputs, identity=known))
    trainer.profile = profile or trainer.profile
    if code := _run(trainer, config, newest, config.steps, renewed):
        return code
    if distributed.rank() == 0:
        if profile and not profile.made:
            say("no profile: the run ended before, or was resumed behind, the step to profile")
        _report(argparse.Namespace(runs=[config.run_dir], out=None))
        print(f"model: {latest(Path(config.run_dir)) / 'policy'}")
        _name_the_best(config, "held-out accuracy")
    return 0


def _sft(options: argparse.Namespace) -> int:
    config = _config(options)
    if not config.sft.data:
        raise ValueError("sft.data is empty; give the path of a .jsonl or .parquet file of rows with worked solutions")
    newest, accepted = _prepare_run_dir(config, options)

    from prime_fast import resume
    from prime_fast.engine import distributed, zero
    from prime_fast.engine.checkpoint import intact
    from prime_fast.stages import sft

    device = zero.start(config.log.hang)
    newest = _together(lambda: newest and intact(Path(config.run_dir)))
    inputs = _together(lambda: sft.load_inputs(config))
    renewed = _together(lambda: resume.check(newest, inputs.identity, accepted, sft.STAGE) if newest else set())
    trainer = sft.Sft(config, device, inputs)
    if code := _run(trainer, config, newest, config.sft.steps, renewed):
        return code
    if distributed.rank() == 0:
        print(f"wrote {trainer.directory}")
        _name_the_best(config, "validation loss")
    return 0


def _run(trainer: Trainer | Sft, config: Config, newest: Path | None, steps: int, renewed: set[str]) -> int:
    """Run all of it, from the checkpoint `newest` on; the exit code, not 0 if it was stopped with a checkpoint."""
    from prime_fast.engine import distributed
    from prime_fast.engine.checkpoint import forget_scores
    from prime_fast.engine.watchdog import Watchdog, way_on

    run_dir = Path(config.run_dir)
    with Watchdog(run_dir, config.log.grace, config.log.hang, trainer.kill):
        try:
            first = trainer.restore(newest, renewed) if newest else 1
            if "data" in renewed:
                forget_scores(run_dir)
            trainer.run(_open_run(config, first - 1, steps), first)
        except distributed.Stop as error:
            if distributed.rank() == 0:
                say(f"prime-fast: {error}; {way_on(run_dir)}", sys.stderr)
            return error.code
        except OSError as error:
            if error.errno not in durable.FULL:
                raise
            told = f"{error.filename} could not be written ({error.strerror})"
            say(f"prime-fast: {told}; make room, then {way_on(run_dir)}", sys.stderr)
            return 1
        finally:
            trainer.close()
    return 0


def _together(work: Callable[[], T]) -> T:
    """work() on every rank. Where it fails on some, the first of them tells and every one ends."""
    from prime_fast.engine import distributed

    result, failure = None, None
    try:
        result = work()
    except (ValueError, FileNotFoundError) as error:
        failure = error
    failed = distributed.gather_lists([failure is not None])
    if failure is not None and distributed.rank() == failed.index(True):
        raise failure
    if any(failed):
        sys.exit(2)
    return result


def _name_the_best(config: Config, measure: str) -> None:
    from prime_fast.engine.checkpoint import best, latest

    top = best(Path(config.run_dir))
    if top not in (None, latest(Path(config.run_dir))):
        print(f"the best by its {measure}: {top / 'policy'}")


def _report(options: argparse.Namespace) -> None:
    from prime_fast.views.report import report, summary_table

    picture = report(options.runs, options.out)
    Console().print(summary_table(options.runs))
    print(f"curves: {picture}")


def _eval(options: argparse.Namespace) -> None:
    from prime_fast.evaluation.evaluate import Settings, default_out, evaluate

    given = {key: value for key, value in vars(options).items() if key in Settings.__dataclass_fields__}
    given |= {"data": tuple(options.data), "out": Path(options.out or default_out(options.model))}
    given["vllm"] = parse_assignments(options.vllm)
    evaluate(Settings(**given), Console())


def _score(options: argparse.Namespace) -> None:
    from prime_fast.data.sources import read
    from prime_fast.rewards import RewardPool

    shape, rows = read(options.rows)
    pairs = _answered(rows, options.rows, options.responses)
    outcomes, start = [], time.perf_counter()
    with (
        RewardPool(options.reward, options.workers, options.timeout, options.sandbox) as pool,
        progress("scoring", unit="responses") as tick,
    ):
        while part := list(islice(pairs, SCORE_ROWS)):
            texts, owners = [text for _, texts in part for text in texts], [r for r, texts in part for _ in texts]
            outcomes += pool.score(texts, owners, tick)
        counts = ", ".join(f"{count} {name}" for name, count in pool.counts.items())
    if not outcomes:
        raise ValueError(f"{options.responses} holds no responses")
    seconds = time.perf_counter() - start
    if options.out:
        Path(options.out).write_text("".join(f"{json.dumps({'outcome': outcome})}\n" for outcome in outcomes))
    print(
        f"{len(outcomes)} responses to {options.rows} ({shape}): {sum(outcome == 1 for outcome in outcomes)} score 1, "
        f"mean outcome {sum(outcomes) / len(outcomes):.4f}, {counts}, {seconds:.1f} s"
    )


def _answered(rows: Iterator, rows_name: str, name: str) -> Iterator[tuple[dict, list[str]]]:
    """Each row with its responses: a line holds a JSON string, a list of them, or an object with `response(s)`."""
    with open(name, encoding="utf-8") as file:
        for number, pair in enumerate(zip_longest(rows, (line for line in file if line.strip())), 1):
            if None in pair:
                raise ValueError(f"{rows_name} and {name} differ in length: only one has a row {number}")
            (where, row), line = pair
            if isinstance(row, ValueError):
                raise row
            try:
                given = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{name}, line {number} is not JSON: {error}") from None
            if isinstance(given, dict):
                given = given.get("responses", given.get("response"))
            texts = given if isinstance(given, list) else [given]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(
                    f"{name}, line {number} has no response: it must be a string, a list of strings, or "
                    'an object with "response" or "responses"'
                )
            yield row | {WHERE: str(where)}, texts


def _doctor(options: argparse.Namespace) -> int:
    from prime_fast.views import doctor

    return doctor.main(options.run_dir, options.quick, options.json)


def _prepare_run_dir(config: Config, options: argparse.Namespace) -> tuple[Path | None, set[str]]:
    """The checkpoint to continue from, or None for a fresh start, and what --accept names. Nothing is written yet."""
    accepted = {part.strip() for words in options.accept for part in words.split(",")}
    if accepted and not options.resume:
        raise ValueError("--accept is about the checkpoint that --resume continues; add --resume, or leave it away")
    run_dir = Path(config.run_dir)
    place = next(path for path in (run_dir, *run_dir.absolute().parents) if os.path.exists(path))
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(f"run_dir={run_dir}: {place} is no directory that can be written to; choose another run_dir")
    if options.resume:
        from prime_fast.resume import newest

        return newest(config, accepted), accepted
    if (run_dir / "config.yaml").exists():
        raise ValueError(f"{run_dir} already holds a run; continue it with --resume, or choose another run_dir")
    return None, accepted


def _open_run(config: Config, resume_step: int, steps: int) -> MetricsLog | None:
    """Write the resolved config and open the metrics; rank 0 only."""
    from prime_fast.engine import distributed
    from prime_fast.metrics import MetricsLog

    if distributed.rank() != 0:
        return None
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    save_config(config, Path(config.run_dir) / "config.yaml")
    return MetricsLog(config.run_dir, steps, config.log.tensorboard, resume_step or None)
