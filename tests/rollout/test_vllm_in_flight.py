"""A real vLLM on the CPU whose weights change, or which sleeps, while responses are unfinished."""

import os
import random
import signal
import time
from pathlib import Path

import processes
import pytest
import torch
from engines import needs_vllm, start_engine
from transformers import AutoModelForCausalLM

from prime_fast.cli import main
from prime_fast.engine import checkpoint
from prime_fast.learner import Learner
from prime_fast.metrics import read_metrics
from prime_fast.rollout import Request, hf
from prime_fast.rollout.collect import Collector
from prime_fast.rollout.fleet import Fleet
from prime_fast.trainer import Trainer

TOKENS = [24, 200, 260, 150, 220, 180]  # of the responses to each prompt: nothing ends them before


@pytest.fixture(scope="module", autouse=True)
def installed():
    needs_vllm()


@pytest.fixture(scope="module")
def engine(workspace):
    """Two of the groups wait until another one has ended."""
    engine = start_engine("vllm", workspace / "model", batch=8, longest=300, ends=())
    yield engine
    engine.close()


def weights(workspace, scale=0.0):
    generator = torch.Generator().manual_seed(1)
    parameters = dict(AutoModelForCausalLM.from_pretrained(workspace / "model").named_parameters())
    noise = {name: torch.randn(w.shape, generator=generator) * w.std().clamp(min=0.1) for name, w in parameters.items()}
    return {name: (w + scale * noise[name]).detach() for name, w in parameters.items()}


def requests(tokens=TOKENS, shift=0):
    draw = random.Random(7)
    prompts = [[draw.randrange(2, 18) for _ in range(3 + i)] for i in range(len(tokens))]
    seeds = [[draw.getrandbits(63) for _ in range(2)] for _ in tokens]
    return [Request(shift + i, prompts[i], seeds[i], tokens[i], 1.0) for i in range(len(tokens))]


def by_load(engine, new):
    engine.version += 1
    engine.load_weights(new.items())


def by_sleep(engine, new):
    engine.sleep()
    engine.wake()
    by_load(engine, new)
    engine.ready()


def flight(engine, results=()):
    """The groups' samples."""
    results = dict(results)
    while len(results) < len(TOKENS):
        results |= dict(engine.step())
    return [results[key] for key in range(len(TOKENS))]


def changed_in_flight(engine, old, how, new):
    """The groups' samples, with weights that changed after the first one was done, and the old ones' version.

    The engine does not wait for this process: where it was done too early, it starts over.
    """
    for _ in range(20):
        engine.load_weights(old.items())
        before = engine.version
        for request in requests():
            engine.submit(request)
        results = {}
        while not results:
            results |= dict(engine.step())
        how(engine, new)
        samples = flight(engine, results)
        runs = [[version - before for _, version in sample.runs] for sample in sum(samples, [])]
        if runs.count([0, 1]) >= 6:
            assert runs.count([0]) >= 2 and all(run in ([0], [0, 1], [1]) for run in runs)
            return samples, before
    raise AssertionError("the engine was always done before its weights changed")


@pytest.mark.parametrize("how", [by_load, by_sleep])
def test_the_same_weights_go_on_as_if_nothing_had_been(how, engine, workspace):
    start = weights(workspace)
    engine.load_weights(start.items())
    version = engine.version
    for request in requests():
        engine.submit(request)
    expected = flight(engine)
    got, _ = changed_in_flight(engine, start, how, start)
    for one, two in zip(sum(expected, []), sum(got, []), strict=True):
        assert one.runs == ((0, version),) and torch.equal(one.tokens, two.tokens)
        torch.testing.assert_close(one.logprob, two.logprob, rtol=0, atol=1e-5)
    for request in requests():  # the next ones are of one version again
        engine.submit(request)
    assert {sample.runs for sample in sum(flight(engine), [])} == {((0, engine.version),)}


@pytest.mark.parametrize("how", [by_load, by_sleep])
def test_every_token_has_the_logprob_of_the_weights_that_sampled_it(how, engine, workspace):
    """Before the change the old ones, after it the new ones, which read the whole response anew."""
    models = {}
    for change, scale in enumerate((0.0, 0.3)):
        models[change] = AutoModelForCausalLM.from_pretrained(workspace / "model")
        models[change].load_state_dict(weights(workspace, scale), strict=False)
    got, before = changed_in_flight(engine, weights(workspace), how, weights(workspace, 0.3))
    for request, samples in zip(requests(), got, strict=True):
        for sample in samples:
            ids = torch.cat([torch.tensor(request.prompt), sample.tokens])
            with torch.no_grad():
                logits = {
                    change: model(ids[None]).logits[0, len(request.prompt) - 1 : -1] for change, model in models.items()
                }
            for (start, version), (end, _) in zip(sample.runs, [*sample.runs[1:], (len(ids), 0)], strict=True):
                logprob = logits[version - before].log_softmax(-1).gather(1, sample.tokens[:, None])[start:end, 0]
                torch.testing.assert_close(sample.logprob[start:end], logprob, rtol=0, atol=1e-5)


def test_it_works_while_nobody_listens(engine, workspace):
    """More finishes meanwhile than a socket holds."""
    many = [Request(i, [2, 3, 4], range(8), 290, 1.0) for i in range(16)]
    for request in many:
        engine.submit(request)
    deadline = time.monotonic() + 120
    while any_cpu_time(engine.process.pid) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert time.monotonic() < deadline
    begun, done = time.monotonic(), []
    while len(done) < 16:
        done += engine.step()
    assert time.monotonic() - begun < 2.0


def any_cpu_time(pid):
    """Whether it computes: it has used more than a tenth of the last second."""

    def used():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    first = used()
    time.sleep(1.0)
    return used() - first > 0.1


def test_an_engine_lost_with_unfinished_groups_redoes_them_with_the_new_weights(workspace):
    engine = start_engine("vllm", workspace / "model", batch=8, longest=300, ends=())
    fleet = Fleet(engine, lambda: iter(weights(workspace, 0.3 * fleet.version).items()))
    try:
        fleet.submit(requests())
        done = {}
        while not done:
            done |= dict(fleet.step())
        before = set(done)
        fleet.sleep()
        os.kill(engine.process.pid, signal.SIGKILL)
        fleet.version = 1
        fleet.wake(changed=True)
        assert fleet.restarts == 1 and fleet.pending.keys() == set(range(len(TOKENS))) - before
        while len(done) < len(TOKENS):
            done |= dict(fleet.step())
        for key, samples in done.items():
            assert [sample.runs for sample in samples] == [((0, int(key not in before)),)] * 2
    finally:
        engine.close()


def train(workspace, run_dir, *overrides):
    return main(["train", str(workspace / "config.yaml"), f"run_dir={run_dir}", "rollout.engine=vllm", *overrides])


LONG = ["rollout.max_response=48", "rollout.batch=12", "engine.micro_tokens=512", "log.eval_every=1"]


@pytest.fixture
def watched(monkeypatch):
    """What every step looked at, and with how many groups in work its training began; evaluations with the policy."""
    seen = {"looked_at": [], "trained": [], "in_work": [], "beside": [], "evaluations": []}
    collect, learn, evaluate = Collector.collect, Learner.learn, Trainer._evaluate

    def watched_collect(self, *arguments, **options):
        seen["fleet"] = self.fleet
        groups, record, fresh = collect(self, *arguments, **options)
        seen["looked_at"] += [group.id for group in fresh]
        seen["trained"] += [group.id for group in groups]
        seen["in_work"].append(len(self.started))
        return groups, record, fresh

    def watched_learn(self, *arguments):
        engine = seen["fleet"].engine
        before = len(engine.finished)
        result = learn(self, *arguments)
        while engine.connection.poll(0):
            engine._note(engine._receive())
        seen["beside"].append(len(engine.finished) - before)
        return result

    def watched_evaluate(self, step):
        original = self.collector.greedy

        def greedy(rows, phases):
            groups = original(rows, phases)
            policy = {name: tensor.clone() for name, tensor in self.learner.policy.weights()}
            seen["evaluations"].append((len(self.collector.started), policy, groups))
            return groups

        self.collector.greedy = greedy
        try:
            return evaluate(self, step)
        finally:
            del self.collector.greedy

    monkeypatch.setattr(Collector, "collect", watched_collect)
    monkeypatch.setattr(Learner, "learn", watched_learn)
    monkeypatch.setattr(Trainer, "_evaluate", watched_evaluate)
    return seen


@pytest.mark.parametrize("early", ["rollout.ahead=1", "rollout.carry=true"])
def test_training_with_groups_in_work(early, workspace, tmp_path, watched):
    """Killed after three steps of six. A step ahead, groups finish while the trainer works; carried, none."""
    assert train(workspace, tmp_path / "run", early, *LONG, "steps=3", "log.checkpoint_every=1") == 0
    in_work = list(watched["in_work"])
    assert train(workspace, tmp_path / "run", early, *LONG, "steps=6", "--resume") == 0
    assert all(count > 0 for count in in_work[:2])
    ids = watched["looked_at"]
    assert ids == list(range(len(ids))) and watched["trained"] == sorted(set(watched["trained"]))
    records = read_metrics(tmp_path / "run")[1:]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(record["skipped"] == 0 and record["rows"] == 24 and record["age"] <= 1 for record in records)
    assert records[0]["token_age"] == records[3]["token_age"] == 0 < max(record["token_age"] for record in records)
    assert any("mismatch_kl_1" in record for record in records)
    fresh = [record["mismatch_max"] for record in records if "mismatch_max" in record]
    assert len(fresh) > 2 and max(fresh) < 1e-3
    if early == "rollout.ahead=1":
        assert sum(watched["beside"]) > 0
    else:
        assert sum(watched["beside"]) == 0
    assert any(count for count, *_ in watched["evaluations"])
    reference = hf.HFEngine(str(workspace / "model"), [1], dtype=torch.float32, device=torch.device("cpu"))
    for _, policy, groups in watched["evaluations"]:
        reference.load_weights(policy.items())
        again = reference.generate([g.prompt for g in groups], [[0]] * len(groups), max_tokens=48, temperature=0.0)
        same = [torch.equal(a.tokens, g.samples[0].tokens) for (a,), g in zip(again, groups, strict=True)]
        assert sum(same) >= len(same) - 1  # two greedy tokens may be as good as equal
    assert checkpoint.latest(tmp_path / "run").name == "step-000006"


def test_two_ranks_go_a_step_ahead_together(workspace, tmp_path):
    words = ["train", workspace / "config.yaml", f"run_dir={tmp_path / 'run'}", "steps=3", "rollout.engine=vllm", *LONG]
    result = processes.torchrun(2, "-m", "prime_fast", *words, "rollout.ahead=1")
    assert result.returncode == 0, result.stderr[-3000:]
    records = read_metrics(tmp_path / "run")[1:]
    assert [(record["skipped"], record["rows"]) for record in records] == [(0, 24)] * 3
    assert max(record["token_age"] for record in records) > 0
    assert max(record.get("mismatch_max", 0.0) for record in records) < 1e-3
