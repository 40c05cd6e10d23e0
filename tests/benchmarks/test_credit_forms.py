import json
import sys

import pytest
import torch

from benchmarks import credit_forms
from benchmarks.credit_forms import FORMS, PRMS

SEED = torch.seed() % 2**31  # another problem each time: what is tested holds for all
BATCHES = 400


def generator(seed=0):
    return torch.Generator().manual_seed(SEED + seed)


@pytest.fixture(scope="module")
def problem():
    print(f"seed {SEED}")
    return credit_forms.make_problem(generator())


def relative_error(problem, ratio, form, fit=None):
    gradient = problem.gradient()
    return float((credit_forms.exact(problem, ratio, fit, FORMS[form]) - gradient).norm() / gradient.norm())


def test_the_gradient_is_that_of_the_mean_outcome(problem):
    logits = problem.policy.clone().requires_grad_()
    chance = logits.log_softmax(-1)[problem.prefix, problem.tokens].sum(1).exp()
    assert float(chance.detach().sum()) == pytest.approx(1)
    (chance @ problem.outcome).backward()
    torch.testing.assert_close(problem.gradient(), logits.grad.flatten(), rtol=1e-9, atol=1e-12)


def test_values_are_chances_of_success(problem):
    value = problem.value()
    assert torch.equal(value[:, -1], problem.outcome)  # all is decided after the last token
    first = problem.policy[0].exp()
    after_first = torch.stack([value[problem.tokens[:, 0] == action, 0][0] for action in range(credit_forms.ACTIONS)])
    assert float(first @ after_first) == pytest.approx(problem.mean)


@pytest.mark.parametrize("prm", PRMS)
@pytest.mark.parametrize("form", ["RLOO", "RLOO, shrunk 1.5", "critic", "critic, shrunk 1.5"])
def test_a_baseline_of_the_prefix_has_no_bias(problem, form, prm):
    ratio = credit_forms.make_prm(problem, prm, generator(1))
    assert relative_error(problem, ratio, form) < 1e-9  # trusted


@pytest.mark.parametrize("form", ["critic", "pav, k 2", "lookahead, k 2", "td, lambda 0.9", "RLOO"])
def test_sampled_estimates_have_the_exact_mean(problem, form):
    ratio = credit_forms.make_prm(problem, "noisy", generator(1))
    found = credit_forms.sampled(problem, ratio, None, FORMS[form], BATCHES, generator(2))
    expected = credit_forms.exact(problem, ratio, None, FORMS[form])
    error = float((found.var(0).sum() / BATCHES).sqrt())
    assert error < 0.2 * float(expected.norm())
    assert float((found.mean(0) - expected).norm()) < 2 * error  # of 120 parameters together: some ten deviations


def test_a_prm_that_knows_nothing_changes_nothing_but_td(problem):
    ratio = torch.zeros_like(problem.tokens, dtype=torch.float64)
    for form, options in FORMS.items():
        error = relative_error(problem, ratio, form) if options.get("credit") in credit_forms.OF_GROUPS else 0.0
        assert (error > 0.05) if form.startswith("td") else (error < 1e-9), form


def test_td_follows_a_bad_prm(problem):
    ratio = credit_forms.make_prm(problem, "wrong", generator(1))
    gradient = problem.gradient()
    for form, least in (("td, lambda 0", -1.0), ("critic", 0.999)):
        mean = credit_forms.exact(problem, ratio, None, FORMS[form])
        direction = float(mean @ gradient / (mean.norm() * gradient.norm()))
        assert least <= direction and (direction < 0.95) == form.startswith("td"), form


def test_a_good_prm_makes_progress_sharper_than_outcomes(problem):
    ratio = credit_forms.make_prm(problem, "perfect", generator(1))
    fit = credit_forms.fitted(problem, ratio, generator(2))
    assert fit.slope > 0.5 and fit.evidence > 0.8
    signal = {
        form: credit_forms.measure(problem, ratio, fit, FORMS[form], BATCHES, generator(3))["signal"]
        for form in ("RLOO", "critic", "pav, k 2")
    }
    assert signal["pav, k 2"] > 1.3 * signal["RLOO"] and signal["critic"] > signal["RLOO"]


@pytest.mark.parametrize("prm", ["wrong", "late"])
def test_a_prm_without_worth_is_not_used(problem, prm):
    ratio = credit_forms.make_prm(problem, prm, generator(1))
    fit = credit_forms.fitted(problem, ratio, generator(2))
    assert fit.slope == 0 and relative_error(problem, ratio, "pav, k 2", fit) < 1e-9


def test_the_command_tells_every_form_of_every_prm(tmp_path, monkeypatch, capsys):
    out = tmp_path / "credit_forms.json"
    monkeypatch.setattr(sys, "argv", ["credit_forms", "--batches", "3", "--out", str(out)])
    credit_forms.main()
    document = json.loads(out.read_text())
    assert list(document["prms"]) == list(PRMS) and str(tmp_path) not in out.read_text()
    for prm in document["prms"].values():
        assert list(prm["forms"]) == list(FORMS)
        assert prm["forms"]["RLOO"]["signal"] == prm["forms"]["RLOO"]["variance"] == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(FORMS) and len({row.count("|") for row in rows}) == 1
