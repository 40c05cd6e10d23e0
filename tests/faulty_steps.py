"""Non-finite losses and gradients in every mini-batch of every model, in the real trainer, on any number of ranks.

python faulty_steps.py CONFIG key=value ...     (or under torchrun)
"""

import sys
from pathlib import Path

import torch

from prime_fast import preflight
from prime_fast.config import load_config
from prime_fast.engine import checkpoint, distributed, zero
from prime_fast.trainer import Trainer


class Faults:
    """Makes chosen mini-batches of an engine go wrong, on the last rank alone."""

    def __init__(self, engine) -> None:
        self.engine, self.optimizer = engine, engine.deepspeed.optimizer
        self.kind, self.minis, self.mini = None, set(), 0
        self.backward, self.step = engine.backward, engine.step
        engine.backward, engine.step = self._backward, self._step

    def arm(self, kind: str, minis: set[int]) -> None:
        self.kind, self.minis, self.mini = kind, minis, 0

    def _due(self, kind: str) -> bool:
        last = distributed.rank() == distributed.world_size() - 1
        return last and self.kind == kind and self.mini in self.minis

    def _backward(self, loss) -> None:
        self.backward(loss * float("inf") if self._due("loss") else loss)

    def _step(self, lr):
        if self._due("gradient"):
            self.optimizer.averaged_gradients[0][0].view(-1)[:1] = float("nan")
        self.mini += 1
        return self.step(lr)


def weights(engine) -> dict[str, torch.Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in engine.weights()}


def changed(before, after) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


def main(arguments: list[str]) -> None:
    config = load_config(arguments[0], arguments[1:])
    Path(config.run_dir).mkdir(exist_ok=True)
    device = zero.start()
    trainer = Trainer(config, device, preflight.load_inputs(config))
    try:
        attack(trainer)
    finally:
        trainer.close()


def attack(trainer: Trainer) -> None:
    models = {"policy": trainer.learner.policy, "prm": trainer.learner.prm}
    faults = {name: Faults(engine) for name, engine in models.items()}
    step = 0

    def make(name: str, kind: str, minis: set[int]) -> dict:
        """A step with these faults; afterwards the engine holds the policy and the metrics tell what was applied."""
        nonlocal step
        step += 1
        for fault in faults.values():
            fault.arm("none", set())
        faults[name].arm(kind, minis)
        before = {model: weights(engine) for model, engine in models.items()}
        record = trainer.step(step)
        case = (name, kind, minis, record)
        for model, engine in models.items():
            lost = len(minis) if model == name else 0
            assert record[f"{model}_updates"] - record[f"{model}_applied"] == lost, case
            after = weights(engine)
            assert changed(before[model], after) == (record[f"{model}_applied"] > 0), case
            assert all(torch.isfinite(tensor).all() for tensor in after.values()), case
            finite = torch.isfinite(torch.tensor([record[f"{model}_loss"], record[f"{model}_grad_norm"]])).all()
            assert finite == (record[f"{model}_applied"] > 0), case
        arguments = (trainer.learner.policy, None, None, trainer.rollout, trainer.inputs, trainer.config)
        preflight.self_check(*arguments)  # the engine's log-probs are those of the policy as it is now
        return record

    assert make("policy", "none", set())["skipped"] == 0
    updates = trainer.work.record["policy_updates"], trainer.work.record["prm_updates"]
    assert min(updates) > 1, updates
    for name in models:
        for kind in ("loss", "gradient"):
            for mini in range(2):
                assert make(name, kind, {mini})["skipped"] == 0
                assert torch.isfinite(torch.tensor(trainer.work.record["entropy"]))
    everything = set(range(2))
    skipped = [make(name, "loss", everything)["skipped"] for name in models]
    assert skipped == [1, 2], skipped
    assert make("policy", "none", set())["skipped"] == 2 and trainer.counts["failed_in_a_row"] == 0

    # three steps in a row without an update of the policy are a stop, which leaves all that the PRM has learnt
    try:
        for policy in (faults["policy"],) * 3:
            policy.arm("gradient", everything)
            step += 1
            trainer.step(step)
    except distributed.Stop as stop:
        assert "policy" in str(stop), stop
        trainer._save_what_was_trained(None, step, trainer._state())
    else:
        raise AssertionError("no stop")
    left = weights(trainer.learner.prm)
    newest = checkpoint.latest(Path(trainer.config.run_dir))
    assert newest.name == f"step-{step:06d}", (newest, step)
    faults["policy"].arm("none", set())
    assert trainer.restore(newest) == step + 1
    assert not changed(left, weights(trainer.learner.prm))
    trainer.counts["failed_in_a_row"] = 0
    assert make("policy", "none", set())["skipped"] == 5
    print(f"{step} steps, engine and trainer agree after each")


if __name__ == "__main__":
    main(sys.argv[1:])
