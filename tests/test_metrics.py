import json
import math
import os
import time

import pytest
import torch

from prime_fast.metrics import GIB, MetricsLog, Phases, peak_gib, read_metrics, resident, write_samples, write_tokens


def filled(run_dir, steps, **options):
    log = MetricsLog(run_dir, 10, **options)
    for step in steps:
        log.write({"step": step, "outcome": step / 10})
    return log


def steps(run_dir):
    return [record["step"] for record in read_metrics(run_dir)]


def test_phases_accumulate_by_name_and_reset():
    phases = Phases()
    for _ in range(2):
        with phases("generate"):
            time.sleep(0.01)
    with pytest.raises(RuntimeError), phases("reward"):
        raise RuntimeError
    seconds = phases.seconds()
    assert list(seconds) == ["seconds/generate", "seconds/reward"]
    assert 0.02 <= seconds["seconds/generate"] < 0.2 and seconds["seconds/reward"] >= 0
    phases.reset()
    assert phases.seconds() == {}


def test_phases_know_their_own_peak():
    """A phase's peak is neither that of the phase before nor forgotten in a nested one; the run's is the highest."""
    phases, megabytes = Phases(), 1 << 20

    def take(count):
        torch.ones(count * megabytes, dtype=torch.uint8)

    before = resident()
    with phases("large"):
        take(600)
    take(600)  # between phases
    with phases("small"):
        take(100)
    with phases("outer"):
        take(400)
        with phases("inner"):
            take(10)
    with phases("outer"):
        pass
    peaks = {name.removeprefix("memory/"): gib * GIB - before for name, gib in phases.memory().items()}
    assert list(peaks) == ["large", "small", "outer", "inner"]
    if os.access("/proc/self/clear_refs", os.W_OK):
        assert peaks["large"] > 590 * megabytes and 90 * megabytes < peaks["small"] < 300 * megabytes
        assert peaks["outer"] > 390 * megabytes > 200 * megabytes > peaks["inner"]
    else:  # only what is resident at the end of a phase is known
        assert all(peak < 300 * megabytes for peak in peaks.values())
    assert peak_gib() * GIB >= max(peaks.values()) + before
    phases.reset()
    assert phases.memory() == {}


def test_records_come_back_with_null_for_what_is_not_finite(tmp_path):
    log = MetricsLog(tmp_path / "deep" / "run", 2)
    log.write({"step": 0, "eval_accuracy": 0.25})
    log.write({"step": 1, "prm_loss": math.nan, "policy_grad_norm": math.inf, "why": "é\u2028"})
    assert read_metrics(tmp_path / "deep" / "run") == [
        {"step": 0, "eval_accuracy": 0.25},
        {"step": 1, "prm_loss": None, "policy_grad_norm": None, "why": "é\u2028"},
    ]


def test_every_record_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    log = filled(tmp_path, [0])
    assert steps(tmp_path) == [0]
    log.write({"step": 1})
    assert steps(tmp_path) == [0, 1]


def test_a_fresh_start_drops_the_old_records(tmp_path):
    filled(tmp_path, range(4))
    write_samples(tmp_path, [{"step": 3, "response": "old"}])
    write_tokens(tmp_path, [{"step": 3, "pieces": ["old"]}])
    filled(tmp_path, [0])
    assert steps(tmp_path) == [0] and [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("rest", ["", '{"step": 5, "outco', '{"step": 5}'])
def test_resuming_keeps_each_step_once(tmp_path, rest):
    filled(tmp_path, range(5))
    write_samples(tmp_path, [{"step": step, "response": "x\ny"} for step in range(5)])
    write_tokens(tmp_path, [{"step": step, "reward": [0.1, -1e-5]} for step in range(1, 5) for _ in range(2)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(rest)  # what a kill in the middle of a write leaves
    assert steps(tmp_path) == [0, 1, 2, 3, 4]
    filled(tmp_path, [4, 5], resume_step=3)
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 1, 2, 3]
    tokens = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines()]
    assert tokens == [{"step": step, "reward": [0.1, -1e-5]} for step in (1, 1, 2, 2, 3, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl", "tokens.jsonl"]


def test_reading_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="holds no metrics.jsonl; give the run_dir"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": \n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(tmp_path)


def test_progress_is_one_plain_line_with_the_time_left(tmp_path, capsys):
    log = MetricsLog(tmp_path, 40)
    assert log.progress({"step": 0, "eval_accuracy": 0.355, "seconds": 9.0}) == "step  0/40  9.0 s  eval 0.355"
    assert "eta" not in log.progress({"step": 0})
    line = log.progress(
        {"step": 10, "outcome": 0.41, "groups_kept": 0.45, "prm_pair_accuracy": 0.71, "approx_kl": -1e-7}
        | {"response_length": 36.2, "tokens_per_second": 12345.0, "seconds": 2.0, "skipped": 0}
    )
    assert line == (
        "step 10/40  outcome 0.41  kept 0.45  prm 0.71 pair  kl 0.0000  36 tok/row  12.3k tok/s  2.0 s  eta 1m00s"
    )
    slower = log.progress({"step": 11, "outcome": None, "seconds": 400.0, "skipped": 1, "eval_accuracy": 0.5})
    assert slower == "step 11/40  400.0 s  eta 1h37m  eval 0.500  skipped 1"
    assert "eta" not in log.progress({"step": 40, "seconds": 2.0})
    failing = {"reward_errors": 0.125, "reward_timeouts": 0.0, "reward_crashes": 1 / 1024, "eval_reward_failures": 0.5}
    line = log.progress({"step": 12} | failing)
    assert line.endswith("  reward errors 12.5%  reward crashes 0.1%  eval reward failures 50.0%")
    printed = capsys.readouterr().out
    assert printed.isascii() and "\x1b" not in printed and "\r" not in printed and printed.count("\n") == 6


def test_tensorboard_holds_the_numbers(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path, 2, tensorboard=True)
    log.write({"step": 1, "outcome": 0.5, "prm_loss": None, "skip_reason": "text"})
    log.write({"step": 2, "outcome": 0.75})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["outcome"]
    assert [(event.step, event.value) for event in events.Scalars("outcome")] == [(1, 0.5), (2, 0.75)]
