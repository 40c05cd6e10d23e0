"""train, sft and prm: a run that writes into its run_dir, is stopped and goes on."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from prime_fast import durable
from prime_fast.cli.views import print_report
from prime_fast.cli.words import config_of, count, resumes, takes_config
from prime_fast.config import Config, save_config
from prime_fast.progress import say

if TYPE_CHECKING:
    from prime_fast.metrics import MetricsLog
    from prime_fast.stages.loop import Loop
    from prime_fast.trainer import Trainer

T = TypeVar("T")


def add_to(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser("train", help="run PRIME")
    takes_config(train)
    resumes(train)
    train.add_argument("--dry-run", action="store_true", help="print model sizes, memory plan and passes; needs no GPU")
    train.add_argument("--ranks", type=count, help="number of GPUs the dry run plans for (default: WORLD_SIZE or 1)")
    train.add_argument(
        "--gpu", help="compare the dry run with a100-80, a100-40, h100, h200 or a number of GiB; exit code 1: too small"
    )
    train.add_argument(
        "--response-tokens", type=count, metavar="N", help="mean length for the seconds that the dry run predicts"
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
    takes_config(sft)
    resumes(sft)
    sft.set_defaults(run=_sft)

    prm = commands.add_parser("prm", help="an implicit PRM from labelled responses; writes RUN_DIR/model")
    takes_config(prm)
    resumes(prm)
    prm.set_defaults(run=_prm)


def _profiled_step(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no step to profile; give a number, or put --profile after CONFIG")
    return int(text)


def _train(options: argparse.Namespace) -> int:
    config = config_of(options)
    if config.prm.loss == "dpo":
        raise ValueError("prm.loss=dpo is for prime-fast prm; set prm.loss to response, centered or prefix")
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
    from prime_fast.metrics import TOKENS
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
    with _alone(config):
        trainer = Trainer(config, device, replace(inputs, identity=known))
        trainer.profile = profile or trainer.profile
        code = _run(trainer, config, newest, config.steps, renewed)
    if code:
        return code
    if distributed.rank() == 0:
        if profile and not profile.made:
            say("no profile: the run ended before, or was resumed behind, the step to profile")
        print_report([config.run_dir])
        if (Path(config.run_dir) / TOKENS).exists():
            print(f"responses, token by token: prime-fast show {config.run_dir}")
        print(f"model: {latest(Path(config.run_dir)) / 'policy'}")
        _name_the_best(config, "held-out accuracy")
    return 0


def _sft(options: argparse.Namespace) -> int:
    config = config_of(options)
    if not config.sft.data:
        raise ValueError("sft.data is empty; give the path of a .jsonl or .parquet file of rows with worked solutions")
    return _stage(config, options, "sft", "Sft")


def _prm(options: argparse.Namespace) -> int:
    config = config_of(options)
    if not config.offline.data:
        raise ValueError(
            "offline.data is empty; give the path of a .jsonl or .parquet file of rows with labelled responses"
        )
    return _stage(config, options, "prm", "Prm")


def _stage(config: Config, options: argparse.Namespace, name: str, loop: str) -> int:
    """Run the class `loop` of prime_fast.stages.NAME, which trains one model on a file of rows."""
    newest, accepted = _prepare_run_dir(config, options)

    from prime_fast import resume
    from prime_fast.engine import distributed, zero
    from prime_fast.engine.checkpoint import intact

    stage = import_module(f"prime_fast.stages.{name}")
    device = zero.start(config.log.hang)
    newest = _together(lambda: newest and intact(Path(config.run_dir)))
    inputs = _together(lambda: stage.load_inputs(config))
    renewed = _together(lambda: resume.check(newest, inputs.identity, accepted, name) if newest else set())
    with _alone(config):
        trainer = getattr(stage, loop)(config, device, inputs)
        code = _run(trainer, config, newest, trainer.steps, renewed)
    if code:
        return code
    if distributed.rank() == 0:
        print(f"wrote {trainer.directory}")
        _name_the_best(config, "validation loss", trainer.role)
    return 0


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


@contextmanager
def _alone(config: Config) -> Iterator[None]:
    """No other run writes into run_dir meanwhile; rank 0 sees to it, for all."""
    from prime_fast import lock
    from prime_fast.engine import distributed

    with ExitStack() as held:
        _together(lambda: distributed.rank() or held.enter_context(lock.alone(Path(config.run_dir))))
        yield


def _run(trainer: Trainer | Loop, config: Config, newest: Path | None, steps: int, renewed: set[str]) -> int:
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


def _open_run(config: Config, resume_step: int, steps: int) -> MetricsLog | None:
    """Write the resolved config and open the metrics; rank 0 only."""
    from prime_fast.engine import distributed
    from prime_fast.metrics import MetricsLog

    if distributed.rank() != 0:
        return None
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    save_config(config, Path(config.run_dir) / "config.yaml")
    return MetricsLog(config.run_dir, steps, config.log.tensorboard, resume_step or None)


def _name_the_best(config: Config, measure: str, role: str = "policy") -> None:
    from prime_fast.engine.checkpoint import best, latest

    top = best(Path(config.run_dir))
    if top not in (None, latest(Path(config.run_dir))):
        print(f"the best by its {measure}: {top / role}")
