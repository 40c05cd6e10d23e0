"""The model card of a trained PRM: what it is, what it was made of, how good it is and how it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import prime_fast
from prime_fast import yaml_text
from prime_fast.config import Config

LOSSES = {
    "response": "cross-entropy of sigmoid(beta Q) and the label",
    "centered": "cross-entropy of the label, on top of the log-odds of the prompt's mean label",
    "prefix": "cross-entropy of the label at every prefix, on top of the log-odds of the prompt's mean label",
    "dpo": "DPO of all pairs of a better and a worse response to a prompt",
}
TAGS = ["reward-model", "process-reward-model", "implicit-prm", "prime-fast"]


def text(config: Config, start: str, reference: str, rows: str, steps: int, judged: dict[str, Any] | None) -> str:
    """judged: of `discrimination.judge`."""
    about: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": TAGS}
    if not Path(start).exists():
        about["base_model"] = start.partition("@")[0]
    prm, name = config.prm, Path(config.run_dir).name
    epochs = f"{config.offline.epochs:g} epoch" + "s" * (config.offline.epochs != 1)
    made = {
        "starts as": start,
        "reference": reference,
        "data": rows,
        "loss": LOSSES[prm.loss],
        "beta": config.prime.beta,
        "steps": f"{steps} ({epochs}) of {prm.mini_batch} responses",
        "learning rate": f"{prm.lr:g} ({prm.schedule}, warm-up {prm.warmup:g})",
        "seed": config.seed,
    }
    return f"""---
{yaml_text.write(about).strip()}
---

# {name}

An implicit process reward model (arXiv 2412.01981), trained by prime-fast {prime_fast.__version__}: a causal language
model, of which the reward of each token of a response is

    r_t = beta (log PRM(y_t | x, y_<t) - log reference(y_t | x, y_<t)),    beta = {config.prime.beta:g}

and that of a step or a whole response the sum over its tokens. It says nothing without its reference.

| | |
| --- | --- |
{_table(made)}

{_judged(judged)}

    prime-fast score-steps {config.run_dir}/model --reference {reference} rows.jsonl
    prime-fast eval MODEL --data rows.jsonl --samples 8 --prm {config.run_dir}/model --reference {reference}
"""


def _judged(judged: dict[str, Any] | None) -> str:
    if judged is None:
        return "It was not judged on held-out responses."
    shown = {
        "responses": f"{judged['responses']} to {judged['prompts']} prompts, {judged['good']:.1%} of them good",
        "AUC": _number(judged["auc"]),
        "pairs of one prompt in the right order": f"{_number(judged['pair_accuracy'])} of {judged['pairs']}",
        "calibration error": _number(judged["calibration_error"]),
    }
    return f"| on held-out responses | |\n| --- | --- |\n{_table(shown)}"


def _number(value: float | None) -> str:
    return "nothing to compare" if value is None else f"{value:.3f}"


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(f"| {key} | {value} |" for key, value in rows.items())
