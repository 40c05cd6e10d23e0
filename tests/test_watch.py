"""What begins to go wrong is told once, when it begins, and what healthy learning does is not."""

import json
import random
import re
from pathlib import Path

import pytest

from prime_fast.cli import main
from prime_fast.config import known_keys
from prime_fast.engine import checkpoint
from prime_fast.metrics import read_metrics
from prime_fast.watch import CALM, WATCHERS, WINDOW, Watch, limits_of, replay

ROOT = Path(__file__).parents[1]
LIMITS = {name: watcher.limit for name, watcher in WATCHERS.items()}
NORMAL = {
    "outcome": 0.4, "outcome_std": 0.49, "entropy": 0.4, "response_length": 300.0,
    "length_correlation": -0.1, "truncated": 0.02,
    "approx_kl": 0.001, "reference_kl": 0.05, "mismatch_kl": 0.001, "prm_pair_accuracy": 0.65,
    "prm_explained_75": 0.05, "groups_kept": 0.5, "reward_errors": 0.0, "reward_timeouts": 0.01, "reward_crashes": 0.0,
    "policy_grad_norm": 0.3, "prm_grad_norm": 2.0, "process_over_outcome": 0.4,
}  # fmt: skip
WRONG = {  # what a record has when it goes wrong, and what excuses the same
    "outcome_fall": ({"outcome": 0.1}, None),
    "entropy_collapse": ({"entropy": 0.03}, {"outcome": 0.95}),
    "entropy_explosion": ({"entropy": 1.3}, {"outcome": 0.6}),
    "length_collapse": ({"response_length": 90.0}, {"outcome": 0.6}),
    "length_explosion": ({"response_length": 950.0}, {"outcome": 0.6}),
    "truncation": ({"truncated": 0.6}, None),
    "policy_kl": ({"approx_kl": 0.06}, None),
    "reference_kl": ({"reference_kl": 0.6}, {"outcome": 0.6}),
    "mismatch": ({"mismatch_kl": 0.02}, None),
    "prm_chance": ({"prm_pair_accuracy": 0.3}, None),
    "prm_misleads": ({"prm_explained_75": -0.3}, None),
    "few_groups": ({"groups_kept": 0.04}, {"outcome": 0.95}),
    "reward_failures": ({"reward_timeouts": 0.15, "reward_errors": 0.1}, None),
    "reward_constant": ({"outcome_std": 0.0}, {"outcome": 0.95}),
    "policy_grad_spike": ({"policy_grad_norm": 9.0}, None),
    "prm_grad_spike": ({"prm_grad_norm": 60.0}, None),
    "process_dominates": ({"process_over_outcome": 6.0}, {"prm_explained_75": 0.3}),
}


def records(count, first=1, **changes):
    noise = random.Random(first)
    made = [{key: value * noise.uniform(0.97, 1.03) for key, value in NORMAL.items()} for _ in range(count)]
    return [record | {"step": first + i} | changes for i, record in enumerate(made)]


@pytest.mark.parametrize("name", WATCHERS)
def test_it_begins_once_and_ends_once(name):
    wrong, excuse = WRONG[name]
    steps = 1 if "spike" in name else WINDOW
    run = [*records(WINDOW), *records(steps, WINDOW + 1, **wrong), *records(2 * WINDOW, WINDOW + steps + 1)]
    watch = Watch(LIMITS)
    changes = [change for record in run for change in watch.look(record)]
    began, ended = (change.step for change in changes)
    assert [(c.name, c.began) for c in changes] == [(name, True), (name, False)]
    assert (
        WINDOW + 1
        <= began
        <= WINDOW
        + WATCHERS[name].steps
        + (name == "outcome_fall")
        + (WINDOW if re.search("in the me(an|dian) of", changes[0].told) else 0)
    )
    assert began < ended and ended >= WINDOW + steps + CALM
    assert [r["step"] for r in run if f"watch/{name}" in r] == list(range(began, ended))
    assert not [key for record in run for key in record if key.startswith("watch/") and key != f"watch/{name}"]
    told = changes[0].told
    assert f"{WATCHERS[name].metric} is" in told and f"(limit {LIMITS[name]:g})" in told and "\n" not in told
    assert told.endswith(WATCHERS[name].advice)
    if excuse:
        run = [
            *records(WINDOW),
            *records(WINDOW, WINDOW + 1, **excuse),
            *records(WINDOW, 2 * WINDOW + 1, **wrong | excuse),
        ]
        assert not replay(run, LIMITS)


@pytest.mark.parametrize("name", WATCHERS)
def test_what_does_not_last_or_is_not_known_is_not_told(name):
    wrong, _ = WRONG[name]
    if "spike" not in name:
        assert not replay([*records(WINDOW), *records(1, WINDOW + 1, **wrong), *records(9, WINDOW + 2)], LIMITS)
    for nothing in (None, float("nan")):
        assert not replay(records(2 * WINDOW, **dict.fromkeys(wrong, nothing)), LIMITS)
    assert not replay(
        [*records(WINDOW), *records(WINDOW, WINDOW + 1, **wrong)],
        LIMITS | {name: 1e9 if WATCHERS[name].side == "above" else -1e9},
    )


MEASURED = json.loads((ROOT / "benchmarks/results/cpu/watchers.json").read_text())["runs"]


def test_every_watcher_has_told_of_a_real_run_that_went_wrong_its_way():
    failing = {name: run for name, run in MEASURED.items() if not name.startswith("healthy")}
    assert {name for run in failing.values() for name in run["tells"]} == set(WATCHERS)
    assert not [name for name, run in failing.items() if not set(run["tells"]) <= set(run["began"])]


def test_runs_that_learn_are_left_alone():
    """One of them has a gradient of 800 times the usual one, which is told."""
    healthy = {name: run for name, run in MEASURED.items() if name.startswith("healthy")}
    assert len(healthy) > 30 and min(run["steps"] for run in healthy.values()) >= 40
    assert [name for run in healthy.values() for name in run["began"]] == ["policy_grad_spike"]


def test_entropy_may_fall_as_failures_do():
    """As in addition: from an outcome of 0.13 to one of 0.86."""
    assert not replay(records(3, outcome=0.13) + records(9, 4, outcome=0.86, entropy=0.03), LIMITS)
    (change,) = replay(records(3, outcome=0.13) + records(9, 4, outcome=0.6, entropy=0.03), LIMITS)
    assert change.name == "entropy_collapse"


def test_a_length_that_pays_by_itself_is_no_excuse():
    """The outcome rises as responses get longer, or shorter, because they do."""
    for name, sign, length in (("length_explosion", 1, 950.0), ("length_collapse", -1, 90.0)):
        changed = {"response_length": length, "outcome": 0.8}
        paid = records(2, 6, **changed, length_correlation=sign * 0.9)
        alike = records(9, 8, **changed, length_correlation=None)  # all are as the reward likes them
        (change,) = replay(records(5) + paid + alike, LIMITS)
        assert (change.name, change.step) == (name, 8)
        assert not replay(records(5) + records(11, 6, **changed, length_correlation=-sign * 0.9), LIMITS)


def test_one_step_whose_outcomes_hardly_differ_is_nothing():
    """What is divided by their variance, or by their advantages, then has no bound."""
    assert not replay(
        records(25) + records(1, 26, prm_explained_75=-1e4, process_over_outcome=1e4) + records(9, 27), LIMITS
    )
    drowned = {"process_over_outcome": 6.0, "prm_explained_75": 0.3}
    assert not replay(records(25, **drowned) + records(1, 26, **drowned | {"prm_explained_75": -1e4}), LIMITS)


def test_a_spike_is_one_after_norms_that_drift_too():
    """As a PRM's do in a run's first steps. A thousandfold is told, a sixtyfold is not yet."""
    drift = [record | {"prm_grad_norm": 0.2 * 1.28**i} for i, record in enumerate(records(13))]
    assert not replay(drift + records(1, 14, prm_grad_norm=50.0), LIMITS)
    (change,) = replay(drift + records(1, 14, prm_grad_norm=1000.0), LIMITS)
    assert (change.name, change.step) == ("prm_grad_spike", 14)


def test_an_outcome_that_falls_excuses_nothing():
    run = records(5) + records(9, 6, outcome=0.9) + records(9, 15, outcome=0.6, entropy=2.0)
    (change,) = replay(run, LIMITS)
    assert change.name == "entropy_explosion" and change.step == 18


def test_state_goes_on_where_it_was():
    run = [record for name in ("truncation", "policy_kl") for record in records(40, **WRONG[name][0])]
    run = [record | {"step": i + 1} for i, record in enumerate(run)]
    whole = [c.told for c in replay(run, LIMITS)]
    assert len(whole) == 3
    for cut in (1, 2, 3, 30, 42, 79):
        before, after = Watch(LIMITS), Watch(LIMITS)
        told = [c.told for record in run[:cut] for c in before.look(dict(record))]
        state = json.loads(json.dumps(before.state_dict()))
        before.look(dict(run[cut]))  # moves nothing of what was saved
        after.load_state_dict(state)
        assert told + [c.told for record in run[cut:] for c in after.look(dict(record))] == whole


def test_the_documentation_is_the_codes(configure):
    text = (ROOT / "docs/watching.md").read_text()
    rows = {row[0]: row for row in re.findall(r"^\| `(\w+)` \| (.*?) \| (\S+) \| (\d) \| (.*) \|$", text, re.M)}
    assert list(rows) == list(WATCHERS)
    keys = known_keys()
    for name, (_, begins, limit, steps, advice) in rows.items():
        watcher = WATCHERS[name]
        assert (float(limit), int(steps)) == (watcher.limit, watcher.steps), name
        assert watcher.metric in begins or watcher.metric in (
            "reward_failures",
            "entropy",
            "response_length",
            "prm_grad_norm",
        )
        for told in (advice, watcher.advice):
            named = re.findall(r"\b(?:policy|prm|prime|rollout|reward)\.\w+", told)
            assert set(named) <= set(keys), named
        assert set(re.findall(r"\b(?:policy|prm|prime|rollout|reward)\.\w+", watcher.advice)) <= set(
            re.findall(r"\b(?:policy|prm|prime|rollout|reward)\.\w+", advice + begins)
        ), name
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    assert "watch:" in example


def test_what_means_nothing_in_a_run_is_not_watched(configure):
    assert "prm_misleads" not in limits_of(configure()) and "prm_misleads" in limits_of(configure("prime.credit=pav"))
    assert limits_of(configure("rollout.top_p=0.9"))["mismatch"] == pytest.approx(0.01 + 0.9 - 1 + 0.10536, abs=1e-4)
    limits = limits_of(configure("watch.limits={truncation: null, policy_kl: 1}"))
    assert "truncation" not in limits and limits["policy_kl"] == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["watch.limits={entropy_colapse: 1}"], "did you mean entropy_collapse?"),
        (["watch.stop=[x]"], "give one of outcome_fall"),
        (["watch.limits={truncation: true}"], "a number is wanted"),
        (["watch.limits={truncation: null}", "watch.stop=[truncation]"], "leave it out of one of them"),
    ],
)
def test_mistakes(configure, words, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        configure(*words)


def test_a_real_run_tells_once_stops_and_goes_on(workspace, tmp_path, capsys):
    """A reward that is always 0: told, stopped with a checkpoint; resumed, nothing is told again."""
    (tmp_path / "reward.py").write_text("def compute_score(data_source, solution_str, ground_truth):\n    return 0.0\n")
    arguments = ["train", str(workspace / "config.yaml"), f"run_dir={tmp_path / 'run'}", "rollout.keep=[0, 1]"]
    arguments += [f"reward.function={tmp_path / 'reward.py'}:compute_score", "steps=3", "log.eval_every=0"]
    assert main([*arguments, "watch.stop=[mismatch, reward_constant]"]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("watch: reward_constant began in step 2: outcome_std is 0 (limit 0)") == 1
    (error,) = [line for line in printed.err.splitlines() if line.startswith("prime-fast: ")]
    assert "stopped after step 2 by reward_constant, which watch.stop names; continue from" in error
    assert checkpoint.latest(tmp_path / "run").name == "step-000002"
    assert main([*arguments, "--resume"]) == 0
    assert "reward_constant" not in capsys.readouterr().out
    assert [r.get("watch/reward_constant") for r in read_metrics(tmp_path / "run")] == [None, 1, 1]


def test_a_step_that_is_made_anew_is_looked_at_anew(workspace, tmp_path, capsys):
    """rollout.patience ends the run in a step that changed nothing, which --resume repeats."""
    arguments = ["train", str(workspace / "config.yaml"), f"run_dir={tmp_path / 'run'}", "rollout.keep=[0.3, 0.4]"]
    arguments += ["rollout.max_rounds=1", "steps=3", "log.eval_every=0", "prime.process_weight=0"]
    for ways, code in ((["rollout.patience=3"], 1), (["rollout.patience=0", "--resume"], 0)):
        assert main([*arguments, *ways]) == code
        assert capsys.readouterr().out.count("watch: few_groups began in step 3: groups_kept is 0 (limit 0.05)") == 1
    assert [r.get("watch/few_groups") for r in read_metrics(tmp_path / "run")] == [None, None, 1]
