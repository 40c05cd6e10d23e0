"""PRIME in TRL, on the rows and the fine-tuned model of the quickstart: docs/trl.md.

make quickstart
python examples/trl_prime.py runs/quickstart/sft/model runs/quickstart/data/train.jsonl --out runs/trl
"""

import argparse
import json
from pathlib import Path

import torch
import trl
from datasets import load_dataset

from prime_fast.integrations.trl import PrimeConfig, PrimeTrainer
from prime_fast.stages.quickstart import compute_score

CURVES = ("reward", "prm/loss", "prm/accuracy", "prm/pair_accuracy", "entropy", "completions/mean_length")


def reward(completions: list, ground_truth: list[str], extra_info: list[dict], **_) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [compute_score(None, *row) for row in zip(texts, ground_truth, extra_info, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("rows", metavar="ROWS", help="JSON lines of the verl shape")
    parser.add_argument("--out", default="runs/trl")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--process-weight", type=float, default=1.0, help="0: RLOO, without a PRM")
    parser.add_argument("--json", metavar="FILE", help="write the curves there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deepspeed", metavar="CONFIG", help="as for any TRL script")
    options = parser.parse_args()
    rows = load_dataset("json", data_files=options.rows, split="train")
    rows = rows.map(lambda row: {"ground_truth": row["reward_model"]["ground_truth"]}, remove_columns="reward_model")
    args = PrimeConfig(
        output_dir=options.out,
        max_steps=options.steps * 4,  # of the optimizer: four for each 64 x 4 completions
        steps_per_generation=4,
        per_device_train_batch_size=64,
        num_generations=4,
        max_completion_length=40,
        learning_rate=1e-4,
        prm_learning_rate=1e-3,
        process_weight=options.process_weight,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
        deepspeed=options.deepspeed,
        logging_steps=4,  # one line for each generation
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PrimeTrainer(model=options.model, reward_funcs=reward, args=args, train_dataset=rows)
    trainer.train()
    trainer.save_model(options.out)
    if options.json:
        steps = [{key: step[key] for key in CURVES if key in step} for step in trainer.state.log_history[:-1]]
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "trl": trl.__version__}
        arguments = {key: vars(options)[key] for key in ("model", "rows", "steps", "process_weight", "seed")}
        record = {"arguments": arguments, "machine": machine, "steps": steps}
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
