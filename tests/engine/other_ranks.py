"""Run by test_other_ranks.py: what one number of ranks wrote, others take up. All are forks of this process.

usage: other_ranks.py CONFIG FOLDER
"""

import os
import socket
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from prime_fast.cli import main
from prime_fast.config import Config, load_config
from prime_fast.engine import distributed, shards, zero
from prime_fast.engine.checkpoint import latest
from prime_fast.engine.writing import write
from prime_fast.engine.zero import deepspeed  # imported there after the accelerator is chosen
from prime_fast.metrics import read_metrics
from prime_fast.stages import sft

SMALL = ["log.eval_every=0", "rollout.prompts=5", "log.checkpoint_every=1", "log.keep=9"]
SAME = ("outcome", "groups_kept", "groups", "rows", "surplus", "response_length", "rollouts", "policy_updates")
CLOSE = ("prm_loss", "prm_grad_norm", "policy_grad_norm", "entropy", "process_over_outcome")


def together(ranks: int, work) -> None:
    """work() in so many new processes over gloo."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
                os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
                work()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(ended), f"{ranks} ranks: {ended}"


def states(engine: zero.Engine) -> dict[str, torch.Tensor]:
    """Of whole parameters: weights of the model, float32 weights, AdamW's moments."""
    utils, found = deepspeed.utils, {name: tensor.clone() for name, tensor in engine.weights()}
    for name, parameter in engine.lm.named_parameters():
        found[f"float32 {name}"] = utils.safe_get_full_fp32_param(parameter).clone()
        for kind in shards.MOMENTS:
            found[f"{kind} {name}"] = utils.safe_get_full_optimizer_state(parameter, kind).clone()
    return found


def step(engine: zero.Engine) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(4, 14, (8, 12), generator=draw)
    sft.accumulate_nll(engine, list(rows[:, :4]), list(rows[:, 4:]), micro_tokens=30)
    assert engine.step(1e-2).applied


def take_up(config: Config, dtype: str, source: Path | None, into: Path) -> None:
    """Go on with what is in `source`, as it is known there; then a step, which is written and made known."""
    device = zero.start()
    model = config.model.model_copy(update={"dtype": dtype})
    engine = zero.Engine("policy", model.policy, model, config.engine, config.policy, device)
    if source is None:
        step(engine)
    else:
        engine.load_states(source)
        before, now = torch.load(source / "known.pt"), states(engine)
        wrong = [name for name in before if not before[name].equal(now[name])]
        assert before.keys() == now.keys() and not wrong, wrong
    step(engine)
    write(into, {shards.file_name(distributed.rank()): engine.states()})
    known = states(engine)
    if distributed.rank() == 0:
        torch.save(known, into / "known.pt")
    distributed.barrier()


def change(before: Path, after: Path) -> torch.Tensor:
    """Of the float32 weights, from one step to the next."""
    before, after = torch.load(before / "known.pt"), torch.load(after / "known.pt")
    return torch.cat([(after[name] - before[name]).flatten() for name in before if name.startswith("float32")])


def train(path: str, run_dir: Path, *words: str) -> None:
    assert main(["train", path, f"run_dir={run_dir}", *SMALL, *words]) == 0


def check(path: str, folder: Path) -> None:
    config = load_config(path, [])
    chain = [("1", "1-1"), ("1", "1-2"), ("1-2", "1-2-1"), ("1-2", "1-2-4")]
    # how far a step may differ: sums in another order, amplified by AdamW's division
    for dtype, bound, hops in (("float32", 1e-3, chain), ("bfloat16", 2e-2, chain[:2])):
        place = folder / dtype
        together(1, partial(take_up, config, dtype, None, place / "1"))
        for before, now in hops:
            together(int(now[-1]), partial(take_up, config, dtype, place / before, place / now))
        for (start, one), (_, other) in zip(hops[::2], hops[1::2], strict=True):
            left, right = change(place / start, place / one), change(place / start, place / other)
            assert (left - right).norm() / left.norm() < bound, (dtype, one, other)
    straight, moved = folder / "straight", folder / "moved"
    together(1, partial(train, path, straight, "steps=2"))
    together(1, partial(train, path, moved, "steps=1"))
    together(2, partial(train, path, moved, "steps=2", "--resume"))
    one, two = read_metrics(straight)[-1], read_metrics(moved)[-1]
    assert {key: one[key] for key in SAME} == {key: two[key] for key in SAME}
    for key in CLOSE:
        assert abs(two[key] - one[key]) <= 1e-3 * abs(one[key]), (key, one[key], two[key])
    first = straight / "checkpoints/step-000001"
    for name in ("policy", "prm"):
        start, left, right = (
            load_file(run / name / "model.safetensors") for run in (first, *map(latest, (straight, moved)))
        )
        update = sum((left[key] - start[key]).square().sum() for key in start) ** 0.5
        assert sum((left[key] - right[key]).square().sum() for key in start) ** 0.5 / update < 1e-3, name
    print("any number of ranks goes on")


if __name__ == "__main__":
    check(sys.argv[1], Path(sys.argv[2]))
