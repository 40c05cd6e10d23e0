"""What --resume continues: the newest checkpoint of a run whose configuration and inputs are what they were.

`--accept PART,...` goes on with others. A renewed part renews what was made of it: other data start an epoch of their
own; groups that were waiting, of other rows, tokens or outcomes, are dropped. Policy, trained PRM and their optimizers
always come from the checkpoint; the reference, a PRM that does not train, and what an adapter is put on, from their
paths.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from prime_fast.config import Config, load_config
from prime_fast.engine.checkpoint import IDENTITY, latest, read
from prime_fast.identity import Identity

# Keys and sections that may differ; with --accept, those of the accepted parts too.
FREE = {
    "steps",
    "run_dir",
    "log",
    "engine",
    "watch",
    "sft.steps",
    "offline.epochs",
    "reward.max_failures",
    "rollout.patience",
}
ACCEPTS = {
    "data": {"data", "sft.data", "sft.eval", "sft.response", "offline.data", "offline.eval"},
    "models": {"model.policy", "model.prm", "model.reference"},
    "tokenizer": set(),
    "reward": {"reward"},
    "packages": set(),
}
# What these name is compared by its content, so that it may have moved.
BY_CONTENT = {
    "data.train",
    "data.eval",
    "sft.data",
    "sft.eval",
    "offline.data",
    "offline.eval",
    "model.policy",
    "model.prm",
    "model.reference",
    "reward.function",
}
TOLD = 3  # differences of a part that a message names


def newest(config: Config, accepted: Collection[str] = ()) -> Path | None:
    """The checkpoint to continue from, None if there is none yet; ValueError if the configuration is another."""
    if unknown := set(accepted) - set(ACCEPTS):
        raise ValueError(f"--accept {min(unknown)!r} is none of {', '.join(ACCEPTS)}")
    run_dir = Path(config.run_dir)
    found = latest(run_dir)
    if found is None:
        return None
    if config.engine.offload == "disk":
        raise ValueError(
            "DeepSpeed does not restore AdamW's step count from disk, so --resume with engine.offload=disk would "
            "not continue the same run; use engine.offload=cpu, or start a new run_dir with "
            f"{_weights(found)}"
        )
    if "models" in accepted and (config.policy.lora or config.prm.lora):
        raise ValueError(
            "--accept models would put the checkpoint's adapter on other weights than it was trained on; put the model "
            f"back, or start a new run_dir with model.policy={found / 'policy'}"
        )
    before = _flatten(load_config(run_dir / "config.yaml").model_dump())
    now = _flatten(config.model_dump())
    free = FREE.union(
        *(ACCEPTS[part] for part in accepted), BY_CONTENT if (found / "state" / IDENTITY).is_file() else ()
    )
    for key in before | now:
        names = {key, key.split(".")[0]}
        if now.get(key) != before.get(key) and not names & free:
            parts = [part for part, keys in ACCEPTS.items() if names & keys]
            ways = "".join(f"add --accept {part}, " for part in parts)
            raise ValueError(
                f"--resume continues the same run, but {key} was {before.get(key)!r} and is {now.get(key)!r}; put it "
                f"back, {ways}or start a new run_dir with {_weights(found)}"
            )
    return found


def check(checkpoint: Path, now: Identity, accepted: Collection[str] = (), stage: str = "train") -> set[str]:
    """The parts that are no more what they were when the checkpoint was written.

    Raises ValueError, what differs and the way on, if one of them is not accepted; or if it is none of such a run.
    """
    read(checkpoint, stage)
    before = _identity(checkpoint)
    if before is None:
        if set(accepted) < set(ACCEPTS):
            raise ValueError(
                f"{checkpoint} is of a version that did not write down which {', '.join(ACCEPTS)} it was made with; "
                f"if they are the same, add --accept {','.join(ACCEPTS)}"
            )
        return set(ACCEPTS)
    changed = {part: told for part in ACCEPTS if (told := _differences(before.get(part, {}), now.get(part, {})))}
    refused = [part for part in changed if part not in accepted]
    if refused:
        raise ValueError(
            f"--resume continues the same run, but this is not what {checkpoint} was made with: "
            + "; ".join(f"{part}, where {changed[part]}" for part in refused)
            + f"; put it back, or go on with what is here now: --resume --accept {','.join(changed)}"
        )
    return set(changed)


def _weights(checkpoint: Path) -> str:
    """The setting with which another run begins as this one has become."""
    role = "policy" if (checkpoint / "policy").is_dir() else "prm"
    return f"model.{role}={checkpoint / role}"


def _identity(checkpoint: Path) -> Identity | None:
    path = checkpoint / "state" / IDENTITY
    return json.loads(path.read_text()) if path.is_file() else None


def _differences(before: dict[str, str], now: dict[str, str]) -> str:
    names = [name for name in before | now if before.get(name) != now.get(name)]
    told = [f"{name} was {before.get(name, 'not there')} and is {now.get(name, 'not there')}" for name in names[:TOLD]]
    return ", ".join(told) + (f" and {len(names) - TOLD} more" if len(names) > TOLD else "")


def _flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
