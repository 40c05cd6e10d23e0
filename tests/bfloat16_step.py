"""One step of the whole loop in bfloat16, then the same responses in float32: `torchrun ... bfloat16_step.py OUT CONFIG
KEY=VALUE ...` on several ranks, or `both` in this process."""

import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_optimizer_state

import prime_kernels
from prime_fast import passes, preflight
from prime_fast.config import Config, load_config
from prime_fast.engine import distributed, zero
from prime_fast.engine.batch import Batch, Group
from prime_fast.trainer import Trainer


def both(config: Path, overrides: list[str], device: torch.device) -> dict[str, dict]:
    """What a step computes, by dtype; float32 works on the responses that bfloat16 sampled."""
    low, groups = step(load_config(config, [*overrides, "model.dtype=bfloat16"]), device)
    exact, _ = step(load_config(config, [*overrides, "model.dtype=float32", "rollout.engine=hf"]), device, groups)
    return {"bfloat16": low, "float32": exact}


def step(config: Config, device: torch.device, groups: list[Group] | None = None) -> tuple[dict, list[Group]]:
    """A step's metrics, log-probs, token rewards and gradients, and the groups it was made of."""
    Path(config.run_dir).mkdir(exist_ok=True)
    trainer = Trainer(config, device, preflight.load_inputs(config))
    collect, advantage, calls = trainer.collector.collect, prime_kernels.prime_advantage, []

    def collected(phases, stream, last):
        nonlocal groups
        if groups is None:
            groups, *rest = collect(phases, stream, last)
            return groups, *rest
        return as_sampled(trainer.learner.policy, groups, config), {}, []

    def recorded(*arguments, **options):
        calls.append((arguments, advantage(*arguments, **options)))
        return calls[-1][1]

    trainer.collector.collect, prime_kernels.prime_advantage = collected, recorded
    sampling = groups is None
    try:
        record = trainer.step(1)
        if sampling:  # the engine has the updated weights; the step compared it with the trainer before them
            preflight.self_check(trainer.learner.policy, None, None, trainer.rollout, trainer.inputs, config)
    finally:
        prime_kernels.prime_advantage = advantage
        trainer.close()
    (prm_logprob, ref_logprob, *_), result = calls[0]
    positions = torch.cat([len(g.prompt) + torch.arange(len(s.tokens)) for g in groups for s in g.samples])
    made = {"record": record, "prm_logprob": prm_logprob, "ref_logprob": ref_logprob, "positions": positions}
    made["token_reward"] = result.token_reward
    for name, engine in (("policy", trainer.learner.policy), ("prm", trainer.learner.prm)):
        moments = [safe_get_full_optimizer_state(p, "exp_avg").flatten() for p in engine.lm.parameters()]
        made[f"{name}_gradient"] = 10 * torch.cat(moments)
    return made, groups


def as_sampled(policy: zero.Engine, groups: list[Group], config: Config) -> list[Group]:
    """The groups as an engine of the policy's own precision would have sampled them: with its log-probs."""
    batch = Batch.of(groups)
    flat = passes.score(policy, batch, passes.split(batch, 1000, config.engine.micro_tokens))
    parts = iter(flat.cpu().split(batch.cu_seqlens.diff().tolist()))
    return [
        Group(g.id, g.row, g.prompt, tuple(sample._replace(logprob=next(parts)) for sample in g.samples), g.outcomes)
        for g in groups
    ]


if __name__ == "__main__":
    out, config, *overrides = sys.argv[1:]
    results = both(Path(config), overrides, zero.start())
    if distributed.rank() == 0:
        torch.save(results, out)
