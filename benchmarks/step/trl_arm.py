"""(c) TRL's trainers on the same rows. Imported by their own processes alone; every step is the library's own.

The rollouts are handed over where each trainer lets them: GRPOTrainer through `rollout_func`; RLOOTrainer, which has no
such argument, by a subclass that answers `_tokenize_prompts` and `_generate_single_turn`. Nothing else is replaced. The
model is a plain one, not under ZeRO-3, whose gathering costs time. A micro-batch holds as many rows, padded to the
longest as the library pads them, as our token budget holds. `train()` runs in a thread and waits for its turn there.
"""

from __future__ import annotations

import queue
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback

from benchmarks.step.workload import END, VOCABULARY, K, lengths, micro_tokens, prompt_room
from prime_fast.engine.batch import Group
from prime_fast.metrics import Phases

ENDLESS = 1_000_000  # steps: the process ends before


class Library:
    def __init__(self, settings: dict[str, Any], algorithm: str, liger: str | None = None) -> None:
        self.turns: queue.Queue[list[Group] | None] = queue.Queue()
        self.answers: queue.Queue[dict[str, float] | BaseException] = queue.Queue()
        self.phases, self.groups, self.running = Phases(), None, False
        self.updates = settings["updates"]
        self.trainer = make(self, settings, algorithm, liger is not None)
        threading.Thread(target=self.train, args=(settings["threads"],), daemon=True).start()

    def train(self, threads: int) -> None:
        if not torch.cuda.is_available():
            torch.set_num_threads(threads)  # it is a setting of each thread
        try:
            self.trainer.train()
        except BaseException as error:  # noqa: BLE001  `step` raises it
            self.answers.put(error)

    def step(self, groups: list[Group]) -> tuple[Phases, dict[str, float]]:
        self.phases = Phases()
        self.turns.put(groups)
        answer = self.answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return self.phases, answer

    def close(self) -> None:
        pass  # the thread waits for a turn, and ends with the process

    # ---- called by the trainer, in its thread

    def next_rollouts(self) -> list[Group]:
        """The rollouts of the next turn; that they are asked for ends the one before."""
        if self.running:
            self.policy.close()
            norms = self.norms[-self.updates :]
            mean = float(self.logprob / self.tokens)
            self.answers.put({"policy_grad_norm": sum(norms) / len(norms), "mean_logprob": mean})
        self.groups, self.running = self.turns.get(), True
        self.policy = ExitStack()
        self.norms, self.logprob, self.tokens = [], 0.0, 0
        return self.groups


class Norms(TrainerCallback):
    def __init__(self, library: Library) -> None:
        self.library = library

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "grad_norm" in logs:
            self.library.norms.append(float(logs["grad_norm"]))


def make(library: Library, settings: dict[str, Any], algorithm: str, liger: bool) -> Any:
    folder, longest, cuda = Path(settings["folder"]), settings["longest"], settings["device"] == "cuda"
    rows = settings["rows"]
    mini = rows // settings["updates"]
    width = prompt_room(longest) + max(lengths(settings["case"], rows, longest))
    together = max(n for n in range(1, mini + 1) if mini % n == 0 and (n == 1 or n * width <= micro_tokens(settings)))
    options = {
        "output_dir": str(folder / "trl"),
        "learning_rate": 0.0,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "max_steps": ENDLESS,
        "per_device_train_batch_size": together,
        "gradient_accumulation_steps": mini // together,
        "steps_per_generation": rows // together,
        "num_generations": K,
        "max_completion_length": longest,
        "temperature": 1.0,
        "beta": 0.0,
        "shuffle_dataset": False,
        "gradient_checkpointing": settings["checkpointing"],
        "use_liger_kernel": liger,
        "bf16": cuda,
        "use_cpu": not cuda,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    prompts = Dataset.from_dict({"prompt": [str(g) for g in range(rows // K)]})
    given = {
        "model": str(folder / "policy"),
        "reward_funcs": lambda completion_ids, **_: [o for group in library.groups for o in group.outcomes],
        "train_dataset": prompts,
        "processing_class": tokenizer(VOCABULARY[settings["shape"]]),
        "callbacks": [Norms(library)],
    }
    if algorithm == "GRPO":
        config = trl.GRPOConfig(**options, loss_type="grpo", scale_rewards="none")  # our RLOO's loss, but for whitening

        def rollouts(prompts: list[str], trainer: Any) -> dict[str, list]:
            prompt_ids, completion_ids = given_rows(library, prompts)
            return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

        return watched(trl.GRPOTrainer, library)(args=config, rollout_func=rollouts, **given)
    return fed(watched(trl.RLOOTrainer, library), library)(args=trl.RLOOConfig(**options), **given)


def given_rows(library: Library, prompts: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    groups = library.next_rollouts()
    asked = [str(group.id) for group in groups for _ in group.samples]
    if prompts != asked:
        raise RuntimeError(f"the trainer asks for prompts {prompts}, the rows are of {asked}")
    rows = [(list(group.prompt), sample.tokens.tolist()) for group in groups for sample in group.samples]
    return [prompt for prompt, _ in rows], [tokens for _, tokens in rows]


def fed(trainer: type, library: Library) -> type:
    """The trainer with our rows where it would sample."""

    class Fed(trainer):
        def _tokenize_prompts(self, prompts):
            self.given = given_rows(library, prompts)
            return self.given[0], None, {}

        def _generate_single_turn(self, *ignored):
            return self.given[1]

    return Fed


def watched(trainer: type, library: Library) -> type:
    """The trainer with a stopwatch around its phases, and the log-probs that it trains with noted."""

    class Watched(trainer):
        def _generate_and_score_completions(self, inputs):
            found = super()._generate_and_score_completions(inputs)
            library.policy.enter_context(library.phases("policy"))
            return found

        def _get_per_token_logps_and_entropies(self, model, ids, mask, keep, *rest, **options):
            compute = super()._get_per_token_logps_and_entropies
            if not options.get("compute_entropy"):  # only the update asks for entropies
                with library.phases("old_logprobs"):
                    return compute(model, ids, mask, keep, *rest, **options)
            found = compute(model, ids, mask, keep, *rest, **options)
            answered = mask[:, -keep:]
            library.logprob += float((found[0].detach() * answered).sum())
            library.tokens += int(answered.sum())
            return found

    return Watched


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {f"t{token}": token for token in range(vocabulary)}
    made = Tokenizer(models.WordLevel(words, unk_token="t1"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=f"t{END}", pad_token="t1", unk_token="t1", padding_side="left"
    )
