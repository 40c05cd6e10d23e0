"""The reference's and the PRM's passes give the same numbers whenever they are made."""

import random
from itertools import pairwise

import pytest
import torch
from engines import needs_vllm
from faulty_steps import changed, weights
from test_learner import groups_of
from test_trainer import make_trainer

from prime_fast import passes, prime
from prime_fast.engine.batch import Batch
from prime_fast.engine.distributed import Stop
from prime_fast.rollout import failures
from prime_fast.rollout.hf import HFEngine


def made(trainer, groups, *, waves, eager=None, planned=None, others=()):
    """Scored, the PRM's weights after it, how many micro-batches were made before the last group was there."""
    stream = trainer.learner.begin_stream(1, planned or len(groups), waves=waves)
    early = 0
    for group in groups:
        while eager and eager.random() < 0.7 and stream.work():
            early += 1
        stream.put(group)
    return stream.finish(others), weights(trainer.learner.prm), early


def same(one, other):
    (scored, moved, _), (again, moved_again, _) = one, other
    assert scored.ref_logprob.keys() == again.ref_logprob.keys()
    for temperature in scored.ref_logprob:
        assert torch.equal(scored.ref_logprob[temperature], again.ref_logprob[temperature])
    assert torch.equal(scored.logprob, again.logprob) and torch.equal(scored.score, again.score)
    assert scored.updates == again.updates and not changed(moved, moved_again)


def kept_and_dropped(trainer):
    groups, _, fresh = trainer.collector.collect(trainer.phases)
    return groups, trainer.learner.for_the_prm_alone(groups, fresh, trainer.collector.surplus)


MORE = ["prm.loss=prefix", "prm.rows=all", "prm.passes=2", "rollout.keep=[0.3, 0.5]"]


@pytest.mark.parametrize("options", [[], ["prime.update=none"], MORE], ids=" ".join)
def test_early_or_late_gives_the_same_bits(options, other_prm, configure, device):
    seed, results = random.randrange(1 << 30), []
    for eager in (None, random.Random(seed), random.Random(seed + 1)):
        settings = [other_prm, *options, "rollout.prompts=12", "rollout.temperature=0.7"]
        trainer = make_trainer(configure(*settings, "prm.mini_batch=24"), device)
        groups, others = kept_and_dropped(trainer)
        results.append(made(trainer, groups, waves=True, eager=eager, others=others))
        trainer.close()
    assert len(results[0][0].ref_logprob) == 2 and (results[0][0].score != 0).all()
    if "prime.update=none" not in options:
        steps = 2 if not options else 2 * (2 + max(1, round(len(others) / 6)))
        assert results[0][0].updates.applied == steps
    for other in results[1:]:
        assert other[2] > 2, seed
        same(results[0], other)


def test_a_mini_batch_of_one_wave_is_packed_as_ever(other_prm, configure, device):
    results = []
    for waves in (False, True):
        trainer = make_trainer(configure(other_prm, "prm.mini_batch=12", "engine.micro_tokens=2000"), device)
        results.append(made(trainer, groups_of(trainer), waves=waves))
        trainer.close()
    same(*results)


def test_waves_change_rounding_alone(other_prm, configure, device):
    results = []
    for waves in (False, True):
        trainer = make_trainer(
            configure(other_prm, "prm.lr=0", "prm.mini_batch=1000", "engine.micro_tokens=60"), device
        )
        results.append(made(trainer, groups_of(trainer), waves=waves)[0])
        trainer.close()
    for one, other in zip(results[0][1:3], results[1][1:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(torch.tensor(scored.updates[2:]) for scored in results), rtol=1e-4, atol=1e-6)


def test_rows_of_a_mini_batch_cut_short_weigh_what_they_would_in_a_whole_one(other_prm, configure, device):
    results = []
    for planned in (None, 12):
        trainer = make_trainer(configure(other_prm, "prm.lr=0", "prm.mini_batch=1000", "prm.grad_clip=0"), device)
        groups = groups_of(trainer)
        assert len(groups) == 6
        results.append(made(trainer, groups, waves=True, planned=planned)[0].updates)
        trainer.close()
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-5)
    assert results[1].grad_norm == pytest.approx(results[0].grad_norm / 2, rel=1e-4)


def test_further_passes_and_dropped_groups_come_after_the_scores(other_prm, configure, device):
    """The same bits as of one stream after another: kept groups, dropped ones, and both once more."""
    trainer = make_trainer(configure(other_prm, *MORE, "prm.mini_batch=8"), device)
    groups, others = kept_and_dropped(trainer)
    assert others and not {group.id for group in others} & {group.id for group in groups}
    assert all(not 0.3 <= sum(group.outcomes) / 4 <= 0.5 for group in others)
    scored, after, _ = made(trainer, groups, waves=False, others=others)
    trainer.close()
    trainer = make_trainer(configure(other_prm, *MORE[:1], "prm.mini_batch=8"), device)
    parts = [trainer.learner.stream_of(1, part).finish() for part in (groups, others) * 2]
    assert torch.equal(parts[0].logprob, scored.logprob) and torch.equal(parts[0].score, scored.score)
    assert torch.equal(parts[0].ref_logprob[1.0], scored.ref_logprob[1.0])
    assert not changed(after, weights(trainer.learner.prm))
    made_, losses = zip(*((part.updates.made, part.updates.loss) for part in parts), strict=True)
    assert scored.updates.made == scored.updates.applied == sum(made_) and min(made_) > 1
    first = (losses[0] * made_[0] + losses[1] * made_[1]) / (made_[0] + made_[1])
    assert scored.updates.loss == pytest.approx(first) and losses[2] < losses[0]
    trainer.close()


@pytest.mark.parametrize("kind", ["centered", "prefix"])
def test_a_loss_on_top_of_odds_is_that_of_its_log_probs(kind, other_prm, configure, device):
    """With the log-odds of each group's own mean outcome, whatever groups are packed together."""
    trainer = make_trainer(configure(other_prm, f"prm.loss={kind}", "prm.lr=0", "prm.mini_batch=1000"), device)
    groups = groups_of(trainer)
    scored, _, _ = made(trainer, groups, waves=True)
    batch = Batch.of(groups)
    rows = batch.outcome, batch.cu_seqlens
    odds = prime.prm_intercept(batch.outcome, batch.group)
    want = prime.prm_loss(scored.logprob, scored.ref_logprob[1.0], *rows, kind=kind, intercept=odds)
    assert scored.updates.loss == pytest.approx(want.item(), rel=1e-5)
    plain = prime.prm_loss(scored.logprob, scored.ref_logprob[1.0], *rows)
    assert abs(plain.item() - want.item()) > 1e-3
    trainer.close()


def test_it_is_the_plain_passes(other_prm, configure, device):
    """Before any update: log-probs as `score` gives them on other packs."""
    trainer = make_trainer(configure(other_prm, "prm.lr=0"), device)
    groups = groups_of(trainer)
    scored, _, _ = made(trainer, groups, waves=True, eager=random.Random(0))
    batch = Batch.of(groups)
    minis = passes.split(batch, 1000, 200)
    torch.testing.assert_close(scored.logprob, passes.score(trainer.learner.prm, batch, minis), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scored.ref_logprob[1.0], passes.score(trainer.learner.reference, batch, minis))
    sums = [part.sum() for part in (scored.logprob - scored.ref_logprob[1.0]).split(batch.cu_seqlens.diff().tolist())]
    torch.testing.assert_close(scored.score, 0.05 * torch.stack(sums), rtol=1e-4, atol=1e-6)
    trainer.close()


def test_the_passes_run_while_vllm_decodes(configure, device, monkeypatch):
    needs_vllm()
    settings = ["rollout.engine=vllm", "rollout.prompts=24", "rollout.batch=8", "prm.mini_batch=48"]
    trainer = make_trainer(configure(*settings), device)
    assert trainer.overlaps
    beside, make = [], trainer.learner.begin_stream

    def watched(*arguments, **options):
        stream = make(*arguments, **options)
        work = stream.work

        def noted():
            busy, done = bool(trainer.rollout.pending), work()
            beside.append(busy and done)
            return done

        stream.work = noted
        return stream

    monkeypatch.setattr(trainer.learner, "begin_stream", watched)
    record = trainer.step(1)
    assert record["skipped"] == 0 and record["prm_updates"] == record["prm_applied"] == 2
    assert sum(beside) > 0
    trainer.close()


def test_nobody_listens_while_there_is_work(configure, device, monkeypatch):
    trainer = make_trainer(configure("rollout.prompts=12", "rollout.batch=4", "prm.mini_batch=8"), device)
    trainer.overlaps = True
    events, fleet, make = [], trainer.rollout, trainer.learner.begin_stream
    step = fleet.step

    def watched(*arguments, **options):
        stream = make(*arguments, **options)
        work = stream.work

        def noted():
            events.append(("work", work()))
            return events[-1][1]

        stream.work = noted
        return stream

    monkeypatch.setattr(fleet, "step", lambda: events.append(("listens", fleet.patience)) or step())
    monkeypatch.setattr(trainer.learner, "begin_stream", watched)
    trainer.step(1)
    pairs = [
        (done, seconds) for (what, done), (then, seconds) in pairwise(events) if (what, then) == ("work", "listens")
    ]
    assert {(done, seconds > 0) for done, seconds in pairs} == {(True, False), (False, True)}
    assert fleet.patience > 0  # an evaluation has nothing else to do
    trainer.close()


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_off_with_one_key(overlap, configure, device, monkeypatch):
    monkeypatch.setattr(HFEngine, "concurrent", True)
    trainer = make_trainer(configure(f"prime.overlap={overlap}"), device)
    assert trainer.overlaps == (overlap == "true")
    trainer.close()


def test_what_the_prm_has_learnt_and_its_groups_outlive_a_stop(configure, device, monkeypatch):
    """The rewards fail for good once the PRM has trained on the first groups: these open the next step."""
    trainer = make_trainer(
        configure("rollout.prompts=12", "rollout.batch=4", "prm.mini_batch=4", "engine.micro_tokens=240"), device
    )
    trainer.overlaps = True
    before, check = weights(trainer.learner.prm), failures.check

    def failing(groups, *rest):
        if len(groups) > 12:
            raise Stop("the reward failed")
        check(groups, *rest)

    monkeypatch.setattr(failures, "check", failing)
    with pytest.raises(Stop, match="the reward failed"):
        trainer.step(1)
    assert trainer.work.moved == {"prm"} and changed(before, weights(trainer.learner.prm))
    kept = trainer.collector.surplus
    assert kept and kept == sorted(kept, key=lambda group: group.id)
    monkeypatch.setattr(failures, "check", check)
    groups, _, _ = trainer.collector.collect(trainer.phases)
    assert [group.id for group in groups] == [group.id for group in kept][:12]
    trainer.close()
