"""How many groups a step starts, what is left over, and how old it gets: the real Collector on a simulated engine."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import collection as simulation
from prime_fast.config import RolloutConfig
from prime_fast.engine.batch import Batch, Group, Sample
from prime_fast.rollout import demand
from prime_fast.rollout.collect import Collector, _length_correlation
from prime_fast.rollout.fleet import Fleet


@pytest.mark.parametrize(
    ("prompts", "rate", "slots", "steps"),
    [(256, 0.1, 256, 6), (64, 0.3, None, 30), (64, 0.3, 256, 30), (64, 0.5, None, 30), (64, 0.9, None, 30)],
)
def test_few_rows_are_stale_and_few_groups_too_many(prompts, rate, slots, steps):
    """These steps are few: benchmarks/results/cpu/collection.json has more, at every rate."""
    result = simulation.run(simulation.Case(prompts, 4, lambda step: rate, slots), steps)
    assert result.stale < 0.1 and result.stalest < 0.5 and result.over <= 1.15 and result.wasted == 0, result
    assert result.rounds < 2.5 and result.idle < result.ideal_idle + 0.16, result


def test_a_drifting_rate_is_followed():
    result = simulation.run(simulation.Case(64, 4, simulation.drifting(60), 256), 60)
    assert result.stale < 0.15 and result.stalest < 0.8 and result.over <= 1.2 and result.wasted == 0, result


class Steps:
    """A collector whose steps are made one by one."""

    def __init__(self, slots=64, rate=0.3, **options):
        self.world = simulation.World(slots, seed=0)
        self.fleet = Fleet(self.world, lambda: iter(()))
        self.config = RolloutConfig(**{"prompts": 16, "samples": 4, "max_rounds": 20} | options)
        self.collector = Collector(self.config, 0, [{"prompt_ids": [0]}] * 4096, self.fleet, self.world, self.world)
        self.collector.verifier.thread = simulation.Inline()
        self.rate = rate

    def __call__(self, rate=None, changes=True):
        """One step: (groups, record, batch); then the weights change."""
        self.world.step_begins(self.rate if rate is None else rate)
        groups, record, fresh = self.collector.collect(lambda name: nullcontext())
        batch = Batch.of(groups, self.fleet.version)
        self.fleet.version += changes
        return groups, record, batch


def test_what_finishes_first_does_not_matter():
    """Few slots finish groups in about the order of their start, many by length: the same ones are trained."""
    few, many = Steps(slots=4), Steps(slots=4096)
    for _ in range(6):
        ids = [group.id for group in few()[0]]
        assert len(ids) == 16 and ids == sorted(ids) == [group.id for group in many()[0]]
    assert few.world.now > 4 * many.world.now


def jump(steps):
    """Two steps at a rate of 0.1, and one at 0.9 whose groups are far too many then."""
    for _ in range(2):
        steps(0.1)
    return steps(0.9)


@pytest.mark.parametrize("max_age", [0, 1, 3])
def test_no_group_trains_beyond_max_age(max_age):
    steps = Steps(max_age=max_age)
    jump(steps)
    left = len(steps.collector.surplus)
    assert left > 3 * 16
    wasted, oldest = 0, 0
    for _ in range(5):
        now = steps.fleet.version
        groups, record, batch = steps(0.9)
        ages = [now - group.version for group in groups for _ in group.samples]
        assert record["age"] == pytest.approx(sum(ages) / len(ages)) and max(ages) <= max_age
        assert record["stale"] == pytest.approx(sum(age > 0 for age in ages) / len(ages))
        assert batch.fresh.tolist() == [age == 0 for age in ages]
        wasted, oldest = wasted + record["wasted"], max(oldest, *ages)
    assert oldest == max_age and wasted >= 4 * (left - 16 * max_age)


def test_a_step_of_surplus_alone_says_so():
    steps = Steps()
    jump(steps)
    rollouts = steps.collector.drawn * 4
    _, record, _ = steps(0.9)
    assert record == {"rollouts": rollouts, "age": 1.0, "stale": 1.0, "overstart": 0, "wasted": 0}


def test_groups_do_not_age_while_the_weights_stay():
    steps = Steps()
    jump(steps)
    steps.fleet.version -= 1  # the step applied nothing
    for _ in range(2):
        _, record, batch = steps(0.9, changes=False)
        assert record["age"] == record["stale"] == record["wasted"] == 0 and batch.fresh.all()


def test_overstart_counts_the_groups_that_were_not_needed():
    steps, passing = Steps(), 0
    for _ in range(8):
        before, first = len(steps.collector.surplus), steps.collector.drawn
        groups, record, _ = steps()
        needed = groups[-1].id - first + 1
        assert record["overstart"] == steps.collector.drawn - first - needed
        passing += len(steps.collector.surplus) > 0
        assert len(groups) == 16 and record["stale"] == before / 16
    assert passing


def test_ages_and_the_pass_rate_survive_a_checkpoint():
    steps = Steps()
    for rate in (0.1, 0.1, 0.9):
        steps(rate)
    state = steps.collector.state_dict()
    assert state["surplus"]
    resumed = Steps()
    resumed.collector.load_state_dict(state)
    for rate in (0.5, 0.5, 0.9, 0.9):
        (left, one, _), (right, two, _) = steps(rate), resumed(rate)
        assert one == two and [group.id for group in left] == [group.id for group in right]
        assert [group.version for group in left] == [group.version for group in right]
    assert steps.collector.state_dict()["seen"] == resumed.collector.state_dict()["seen"]


def test_groups_with_a_truncated_response_can_be_dropped(monkeypatch):
    monkeypatch.setattr(simulation, "LONGEST", 1600)
    records = {}
    for dropped in (False, True):
        steps, shares = Steps(filter_truncated=dropped), []
        for _ in range(4):
            groups, record, _ = steps()
            assert len(groups) == 16
            shares.append(any(sample.truncated for group in groups for sample in group.samples))
        assert any(shares) != dropped
        records[dropped] = record
    assert 0.01 < records[True]["groups_truncated"] < 0.3 and "groups_truncated" not in records[False]
    assert records[True]["groups_kept"] < records[False]["groups_kept"]


COUNT = st.integers(0, 500)


@given(st.integers(0, 3000), st.floats(0, 1), COUNT, st.integers(-20, 300), COUNT, st.floats(0, 20))
def test_demand(looked_at, rate, in_work, missing, room, surplus):
    seen = 1 + looked_at, 1 + rate * looked_at
    count = demand.more(*seen, in_work, missing, room, surplus)
    assert 0 <= count <= room
    total, (expected, spread) = in_work + count, demand._passing(*seen, in_work)
    if missing <= 0 or (in_work and expected + demand.CERTAINTY * spread >= missing):
        assert count == 0
    elif room:
        assert count > 0 or in_work >= missing
        assert count == 0 or total <= missing or demand._left_over(*demand._passing(*seen, total), missing) <= surplus
    more = demand.more(*seen, in_work, missing, room + 1, surplus)
    assert more in (count, room + 1)  # the limit alone held it back


def test_the_expected_surplus_is_that_of_a_beta_binomial():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    rate = torch.distributions.Beta(30.0, 60.0).sample((200_000,))
    passing = torch.binomial(torch.full_like(rate, 200.0), rate, generator=generator)
    expected, spread = demand._passing(90.0, 30.0, 200)
    assert expected == pytest.approx(passing.mean().item(), rel=0.01)
    assert spread == pytest.approx(passing.std().item(), rel=0.02)
    for missing in (50, 70, 80):
        left = (passing - missing).clamp(min=0).mean().item()
        assert demand._left_over(expected, spread, missing) == pytest.approx(left, rel=0.05, abs=0.1)


def test_length_correlation_is_of_whole_responses():
    """One that is cut off is long and fails, which says nothing of what the reward likes."""

    def group(number, *responses):
        samples = tuple(Sample(torch.zeros(length).long(), torch.zeros(length), cut) for length, _, cut in responses)
        return Group(number, number, (1,), samples, tuple(outcome for _, outcome, _ in responses))

    first = group(0, (2, 0.0, False), (4, 1.0, False), (9, 0.0, True))
    second = group(1, (30, 0.0, False), (34, 1.0, False), (90, 0.0, True))
    assert _length_correlation([first]) == pytest.approx(1)
    assert _length_correlation([first, second]) == pytest.approx(3 / 10**0.5)
    assert _length_correlation([group(0, (9, 1.0, True), (9, 0.0, True))]) is None
