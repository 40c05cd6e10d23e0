import json
import sys

import pytest
import torch

from benchmarks import lm_head, peers


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(lm_head, "HEADS", {"tiny": (16, 300)})
    return peers.problem(16, 300, 64, "cpu", torch.float32, row=16)


def rows(**changes):
    common = {"op": "policy", "head": "7B", "tokens": 10, "ms": 2.0}
    return [common | {"peer": "bare GEMMs"}, common | {"peer": "ours", "ms": 2.5} | changes]


def test_credit_is_of_the_gemms_an_op_needs():
    assert lm_head.flops("logprob", 2, 3, 5) == 60
    assert lm_head.flops("policy", 2, 3, 5) == lm_head.flops("prm", 2, 3, 5) == 180


def test_summary():
    assert lm_head.summary([3.0]) == (3.0, 0.0)
    assert lm_head.summary([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, 1.0)


def test_shares_are_of_the_bare_gemms_of_the_same_case():
    assert [row["share"] for row in lm_head.with_shares(rows())] == [1.0, 0.8]
    busy = [row | {"cpu_ms": 2 * row["ms"] + 1} for row in rows()]
    assert lm_head.with_shares(busy)[1]["share"] == 5 / 6  # on a CPU, by processor time
    assert lm_head.with_shares(rows(op="prm"))[1]["share"] is None
    assert lm_head.with_shares(rows(ms=None))[1]["share"] is None


def test_a_row_without_numbers_still_stands_in_the_table():
    lines = lm_head.table(lm_head.with_shares(rows(ms=None, note="ImportError: no verl"))).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "| 2.0 |" in lines[2] and "ImportError: no verl" in lines[3]


@pytest.mark.parametrize("op", peers.ANY)
def test_installed_peers_agree(tiny, op):
    """The same log-probs, and for the losses the same gradients, as eager PyTorch in float64."""
    exact = lm_head.float64_logprob(tiny)
    grads = {}
    names = ["eager, float32 logits", "prime_kernels", "prime_kernels, torch back-end"]
    for name in [*names, *(["F.linear_cross_entropy"] if hasattr(torch.nn, "LinearCrossEntropyOptions") else [])]:
        lm_head.clear(tiny)
        logprob = peers.PEERS[name][1](op, tiny)()
        torch.testing.assert_close(logprob.double(), exact, rtol=0, atol=1e-5)
        grads[name] = tiny.hidden.grad, tiny.weight.grad
    want = grads.pop("eager, float32 logits")
    for got in grads.values():
        for g, w in zip(got, want, strict=True):
            assert (g is None) == (w is None) == (op == "logprob")
            if g is not None:
                torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


def test_a_run_writes_rows_for_all_peers_even_missing_ones(tiny, monkeypatch, tmp_path, capsys):
    def missing(op, problem):
        raise ModuleNotFoundError("No module named 'verl'")

    chosen = {name: peers.PEERS[name] for name in ("bare GEMMs", "prime_kernels")}
    monkeypatch.setattr(peers, "PEERS", chosen | {"verl": (("policy",), missing)})
    monkeypatch.setattr(lm_head, "cpu_memory", lambda *case: 12.0)
    command = ["lm_head", "--device", "cpu", "--heads", "tiny", "--tokens", "64", "--rounds", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path), "--note", "a test"])
    lm_head.main()
    record = json.loads((tmp_path / "lm_head.json").read_text())
    gemms, ours, verl = record["rows"]
    assert ours["error"] < 1e-5 and ours["extra_mb"] == 12 and ours["share"] > 0 and gemms["share"] == 1
    assert verl["note"] == "ModuleNotFoundError: No module named 'verl'" and "ms" not in verl
    assert record["machine"]["packages"]["torch"] and record["note"] == "a test"
    assert (tmp_path / "lm_head.png").stat().st_size > 5000 and "No module named 'verl'" in capsys.readouterr().out


def test_resident_memory_is_what_a_step_adds(monkeypatch):
    def step(op, problem):
        return lambda: torch.ones(100 * len(problem.hidden), 2500)  # 1 MB a row

    monkeypatch.setattr(lm_head, "HEADS", {"tiny": (16, 300)})
    monkeypatch.setitem(peers.PEERS, "greedy", (("policy",), step))
    monkeypatch.setattr(peers, "problem", lambda *_: peers.Problem(torch.zeros(64, 16), *[None] * 7))
    assert 60 < lm_head.resident("policy", "tiny", "64", "greedy") < 80


@pytest.mark.benchmark(group="policy loss, forward and backward, 512 x 576 x 8192")
@pytest.mark.parametrize("name", ["bare GEMMs", "eager, float32 logits", "prime_kernels"])
def test_policy_loss_speed(benchmark, name):
    problem = peers.problem(576, 8192, 512, "cpu", torch.float32)
    step = peers.PEERS[name][1]("policy", problem)
    benchmark(step)
    assert (problem.weight.grad is None) == (name == "bare GEMMs")
