"""The PRM outside the loop, and the loop outside the trainer."""

from __future__ import annotations

from benchmarks.measured.words import link, load, table

ENDS = 5  # generations


def offline_prm() -> str:
    """A PRM from labelled responses."""
    result = load("offline_prm.json")
    best, worth = result["best_of"], result["best_of_8_minus"]
    count = max(best["majority"], key=int)
    names = {
        "prm response 0.001": "PRM, cross-entropy, lr 1e-3",
        "prm dpo 0.0003": "PRM, DPO, lr 3e-4",
        "prm dpo 0.001": "PRM, DPO, lr 1e-3",
        "orm 0.0003": "ORM, a linear head on the same model, lr 3e-4",
        "orm 0.001": "ORM, lr 1e-3",
        "majority": "majority vote",
        "random": "chance",
        "oracle": "an oracle",
    }

    def percent(value: list[float], sign: str = "") -> str:
        middle, low, high = (100 * number for number in value)
        return f"{middle:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"

    rows = []
    for key, name in names.items():
        less = [worth[key][other] if key in worth else None for other in ("majority", "orm 0.0003")]
        auc = f"{result['auc'][key]:.2f}" if key in result["auc"] else ""
        rows.append([name, percent(best[key][count]), *("" if x is None else percent(x, "+") for x in less), auc])
    found = result["first_wrong_step"]
    head = (f"one of {count} answers chosen by", "right, percent", "minus majority", "minus the ORM", "AUC")
    return f"""
On the quickstart's task a PRM and an outcome reward model (ORM) learn from {result["samples"]} answers of the SFT
policy to each of {result["prompts"]} prompts, in {result["epochs"]} epoch; then they choose among its answers to
{result["problems"]} held-out problems. Intervals are paired by problem.

{table(head, rows)}

The PRM of the cross-entropy, which was told outcomes alone, finds the first wrong step of
{found["error_accuracy"]:.1%} of the answers that have one and flags none in {found["correct_accuracy"]:.1%} of the
others: F1 {found["f1"]:.1%} ({found["responses"]} answers, threshold from other problems). Made by
`python -m benchmarks.offline_prm runs/offline-prm`: {link("offline_prm.json")}."""


def in_trl() -> str:
    """PRIME in TRL."""
    result = load("trl.json")
    rewards = [step["reward"] for step in result["steps"]]
    first, last = (sum(part) / ENDS for part in (rewards[:ENDS], rewards[-ENDS:]))
    return f"""
On the quickstart's task with TRL {result["machine"]["trl"]} and `PrimeTrainer`, {result["machine"]["threads"]} thread:
the mean outcome of sampled completions goes from {first:.2f}, the mean of the first {ENDS} generations, to {last:.2f},
that of the last {ENDS} of {len(rewards)}. Made by [examples/trl_prime.py](../examples/trl_prime.py) of the quickstart's
SFT model and rows: {link("trl.json")}."""
