import json
import time

import pytest
import torch

from benchmarks import advantage as bench
from benchmarks import advantage_loops
from prime_kernels import prime_advantage


@pytest.mark.parametrize("function", [advantage_loops.padded, advantage_loops.tokens])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_loops_compute_the_advantages(function, gamma):
    arguments = bench.batch(8, 30, "cpu", seed=3)
    got = function(*arguments[:4], bench.K, gamma)
    want = prime_advantage(*arguments, gamma=gamma, backend="torch").advantage
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_a_wrong_candidate_is_not_timed():
    arguments = bench.batch(8, 30, "cpu")
    bench.check({"torch": bench.ours("torch")}, arguments)
    with pytest.raises(ValueError, match="zeros is off by"):
        bench.check({"zeros": lambda prm, *rest: torch.zeros_like(prm)}, arguments)


def test_candidates_take_turns_and_the_first_round_does_not_count():
    calls = []
    clock = iter(range(100))

    def timed(call):
        call()
        return next(clock)

    seconds = bench.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, timed, rounds=2)
    assert calls == ["a", "b"] * 3
    assert seconds == {"a": [2, 4], "b": [3, 5]}


def test_batches_have_the_sizes_that_are_named():
    prm, ref, outcome, cu_seqlens, group = bench.batch(1024, 2740, "cpu")
    assert 1.3e6 < len(prm) < 1.5e6 and len(outcome) == 1024 and cu_seqlens.diff().max() <= 3072
    assert (group.unique(return_counts=True)[1] == bench.K).all()
    assert [bench.batch(size // 2048, 2048, "cpu", shortest=2048)[0].numel() for size in bench.SIZES[:2]] == [
        2**16,
        2**18,
    ]


def test_share_of_the_copy_bandwidth():
    assert bench.share(tokens=10**6, seconds=1e-3, bandwidth=16e9) == pytest.approx(1.0)


def test_a_credit_form_has_the_same_table():
    _, *rows = bench.compare(1, "cpu", [2**13], credit="pav", slope=0.3, drift=0.01)
    assert [row["candidate"] for row in rows] == ["cpu", "torch eager"]


def test_the_table_of_shares_has_every_candidate():
    copy, *rows = bench.compare(1, "cpu", [2**13, 2**14])
    assert [(row["candidate"], row["tokens"]) for row in rows] == [
        (name, size) for size in (2**13, 2**14) for name in ("cpu", "torch eager")
    ]
    for row in rows:
        assert row["share"] == pytest.approx(16 * row["tokens"] / (row["us"] / 1e6) / (copy["gb_per_s"] * 1e9))


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    def short(rows, longest, device, seed=0, shortest=1):
        return batch(min(rows, 16), 20, device)

    batch = bench.batch
    monkeypatch.setattr(bench, "batch", short)
    monkeypatch.setattr("sys.argv", ["advantage", "--device", "cpu", "--rounds", "2", "--out", str(tmp_path)])
    monkeypatch.setattr(bench.os, "getloadavg", lambda: (3.0, 0, 0))
    threads, start = torch.get_num_threads(), time.time()
    bench.main()
    torch.set_num_threads(threads)
    record = json.loads((tmp_path / "advantage.json").read_text())
    assert "load average 3.0" in record["note"] and record["machine"]["threads"] == 2
    names = ["cpu", "torch", "python loops, padded", "python loops, tokens"]
    assert [row["candidate"] for row in record["rows"]] == names
    ours = record["rows"][0]
    assert ours["times_cpu"] == 1 and 0 < ours["min_ms"] <= ours["ms"] < 1e3 * (time.time() - start)
    for row in record["rows"]:
        assert row["times_cpu"] == pytest.approx(row["ms"] / ours["ms"])
    assert capsys.readouterr().out.startswith("| candidate | tokens | rows | runs | ms |")
