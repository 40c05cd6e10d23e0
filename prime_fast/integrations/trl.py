"""TRL's GRPOTrainer with a PRM that trains online, and with the fused LM-head losses: docs/trl.md.

A step of the library is kept as it is, but for three things: the rewards of the sampled completions train the PRM and
become an advantage for each token; log-probs and the policy's loss come from prime_kernels; checkpoints hold the PRM.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models import prepare_deepspeed
from trl.trainer.utils import create_model_from_path, disable_dropout_in_model, get_config_model_id

import prime_kernels
from prime_fast import prime
from prime_fast.integrations.online_prm import OnlinePrm, Optimizer, logprob
from prime_fast.integrations.padded import Rows, add_lm_head_op
from prime_fast.integrations.trl_config import PrimeConfig

__all__ = ["PrimeConfig", "PrimeTrainer"]


class PrimeTrainer(GRPOTrainer):
    """GRPOTrainer's arguments, args being a PrimeConfig, and

    prm_model: path, hub id or model that the PRM starts from; None: the policy's.

    The PRM's frozen reference is the policy's checkpoint. The sum of the rewards is the outcome, in 0..1.
    """

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: PrimeConfig | None = None, *rest: Any, prm_model: Any = None,
        **options: Any,
    ) -> None:  # fmt: skip
        if not isinstance(args, PrimeConfig):
            raise ValueError(f"args is a {type(args).__name__}, which tells nothing of the PRM; pass a PrimeConfig")
        super().__init__(model, reward_funcs, args, *rest, **options)
        if self._is_vlm or self.aux_loss_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "PrimeTrainer trains text models only, not this one that takes images; pass another model"
                if self._is_vlm
                else "the fused loss knows no router loss; set router_aux_loss_coef=0.0"
                if self.aux_loss_enabled
                else "PrimeTrainer's PRM cannot be trained under FSDP; launch with DeepSpeed or DDP"
            )
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        add_lm_head_op(base)
        if self.ref_model is not None:
            add_lm_head_op(self.accelerator.unwrap_model(self.ref_model))
        self.prm = self.prm_reference = None
        if args.process_weight:
            self._add_prm(base, prm_model)

    def _add_prm(self, policy: Any, prm: Any) -> None:
        args, path = self.args, get_config_model_id(policy.config)
        if args.prm_update == "none" and prm is None:
            raise ValueError("prm_update='none' needs a PRM that was trained elsewhere; pass it as prm_model")
        if not path:
            raise ValueError("the policy has no path to load the reference from; pass model as a path or hub id")
        if isinstance(prm, str):
            tokenizer = AutoTokenizer.from_pretrained(prm, trust_remote_code=args.trust_remote_code)
            if tokenizer.get_vocab() != self._tokenizer.get_vocab():
                raise ValueError(
                    f"the tokenizer of prm_model={prm!r} differs from that of the policy, whose tokens a PRM reads; "
                    "pass a PRM that shares it"
                )
        initial = partial(self._load, path, (args.model_init_kwargs or {}).get("revision"))  # the policy's checkpoint
        prm = initial() if prm is None else self._load(prm) if isinstance(prm, str) else prm
        disable_dropout_in_model(prm)
        optimizer = None
        if args.prm_update != "none":
            if args.gradient_checkpointing:
                prm.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
            rows = args.prm_batch_size // self.accelerator.num_processes
            steps = -(-rows // args.per_device_train_batch_size)
            optimizer = Optimizer(args.prm_learning_rate, args.prm_weight_decay, args.prm_max_grad_norm, steps)
        self.prm = OnlinePrm(prm, self.accelerator, args.prm_beta, optimizer)
        shares = self.ref_model is not None and not args.sync_ref_model and policy.dtype == torch.float32
        self.prm_reference = self.ref_model if shares else self._frozen(initial())  # TRL's: the same checkpoint

    def _load(self, path: str, revision: str | None = None) -> Any:
        """In float32, as bfloat16 would round the PRM's updates away; bf16=True computes in that all the same."""
        attention = self.accelerator.unwrap_model(self.model).config._attn_implementation
        options = {"dtype": torch.float32, "attn_implementation": attention, "device_map": None}
        return create_model_from_path(path, revision=revision, trust_remote_code=self.args.trust_remote_code, **options)

    def _frozen(self, model: Any) -> Any:
        disable_dropout_in_model(model)
        add_lm_head_op(model)
        model.requires_grad_(False)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        return model.to(self.accelerator.device).eval()

    # ---- from completions to advantages

    def _calculate_rewards(self, *inputs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*inputs)
        self.outcome = (rewards * self.reward_weights.to(rewards.device)).nansum(1)  # (R,), of all processes
        self.outcome[rewards.isnan().all(1)] = torch.nan
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:  # an evaluation is of the rewards: the PRM neither learns from it nor scores it
            batch["advantages"] = self._advantages(_rows(batch), batch["completion_ids"].shape[1])
        return batch

    def _advantages(self, rows: Rows, width: int) -> Tensor:
        """(B, C) of this process's rows, from the rewards and log-ratios of all."""
        args, outcome, first = self.args, self.outcome, self.accelerator.process_index * len(rows.ids)
        here = slice(first, first + len(rows.ids))
        if (bad := ~((outcome >= 0) & (outcome <= 1))).any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"the outcome of completion {row} is {outcome[row].item()}: the sum of reward_weights * rewards is the "
                "PRM's label and must lie in 0..1; scale the rewards with reward_weights"
            )
        made = rows.made[:, -width:]
        log_ratio = torch.zeros(made.shape, device=made.device)
        if self.prm is not None:
            log_ratio = log_ratio.masked_scatter(made, self._log_ratio(rows, outcome[here]))
        log_ratio, all_made = (self._gathered(x) for x in (log_ratio, made.int()))
        all_made = all_made.bool()
        cu_seqlens = torch.nn.functional.pad(all_made.sum(1).cumsum(0), (1, 0)).int()
        group = torch.arange(len(outcome), device=outcome.device) // self.num_generations
        flat = log_ratio[all_made]
        result = prime_kernels.prime_advantage(
            flat, torch.zeros_like(flat), outcome, cu_seqlens, group, beta=args.prm_beta,
            process_weight=args.process_weight, outcome_weight=args.outcome_weight, estimator=args.advantage_estimator,
            form=args.advantage_form, normalize=args.advantage_normalize, whiten=args.advantage_whiten,
        )  # fmt: skip
        metrics = self._metrics["train"]
        if self.prm is not None:
            correct, pairs = prime.pair_accuracy(result.score, outcome, group)
            metrics["prm/accuracy"].append(float(((result.score > 0) == (outcome > 0.5)).float().mean()))
            metrics["prm/pair_accuracy"].append(correct / pairs if pairs else torch.nan)
            metrics["prm/token_reward_std"].append(float(result.token_reward.std()))
        advantage = torch.zeros_like(log_ratio).masked_scatter(all_made, result.advantage)
        means = advantage.sum(1) / all_made.sum(1)
        self._logs["advantages"].extend(means.tolist())  # in the place of as many that the library has put there
        return advantage[here, :width]

    def _gathered(self, values: Tensor) -> Tensor:
        return self.accelerator.gather(self.accelerator.pad_across_processes(values, dim=1))

    def _log_ratio(self, rows: Rows, outcome: Tensor) -> Tensor:
        """(N,): log-prob of the PRM, which trains on these rows, less that of its reference."""
        args, prm = self.args, self.prm
        micro, size = args.per_device_train_batch_size, args.prm_batch_size // self.accelerator.num_processes
        reference = partial(logprob, self.prm_reference, accelerator=self.accelerator)
        found = []
        for part, labels in zip(rows.cut(size), outcome.split(size), strict=True):
            losses = []
            for few, few_labels in zip(part.cut(micro), labels.split(micro), strict=True):
                ref_logprob = reference(few)
                if prm.optimizer is None:
                    found.append(prm.logprob(few) - ref_logprob)
                    continue
                result = prm.train(few, ref_logprob, few_labels, size)
                found.append(result.logprob - ref_logprob)
                losses.append(result.loss.detach())
            if losses:
                loss = self.accelerator.reduce(torch.stack(losses).sum(), "mean")
                self._metrics["train"]["prm/loss"].append(float(loss))
                self._metrics["train"]["prm/grad_norm"].append(prm.step())
        if args.prm_update == "before":
            found = [prm.logprob(few) - reference(few) for part in rows.cut(size) for few in part.cut(micro)]
        return torch.cat(found)

    # ---- the policy

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int | None = None,
        **ignored: Any,
    ) -> tuple[Tensor, None, None]:  # fmt: skip
        """Of the old policy, and of the reference of the KL term: without a gradient, at the rollouts' temperature."""
        made = attention_mask.bool()
        made[:, :-logits_to_keep] = False
        rows, size = Rows(input_ids, attention_mask, made), batch_size or len(input_ids)
        flat = torch.cat([logprob(model, part, self.accelerator, self.temperature) for part in rows.cut(size)])
        made = made[:, -logits_to_keep:]
        return flat.new_zeros(made.shape).masked_scatter(made, flat), None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        made = _made(inputs).bool()
        advantage = inputs["advantages"].reshape(len(made), -1).expand(made.shape)
        old, ref = (
            inputs[name][made] if name in inputs else None for name in ("old_per_token_logps", "ref_per_token_logps")
        )
        (rows,) = _rows(inputs).cut(len(made))
        op = partial(
            prime_kernels.linear_policy_loss,
            targets=rows.targets,
            old_logprob=old,
            # a weight that is no share of the KL term; as it is never negative, clipping stays what it is
            advantage=(advantage * inputs.get("importance_sampling_ratio", 1.0))[made],
            token_weight=self._token_weight(made, inputs["num_items_in_batch"])[made],
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            temperature=self.temperature,
            entropy_coef=self.entropy_coef,
            ref_logprob=ref,
            kl_coef=self.beta,
        )
        with self.accelerator.autocast():
            result = rows.run(model, op)
        self._note(result, made, advantage[made], old, ref)
        return result.loss

    def _token_weight(self, made: Tensor, generated: Tensor) -> Tensor:
        """(B, C): the share of each token in the loss of args.loss_type, as GRPOTrainer has it. generated: tokens of
        the whole generation batch."""
        trains = self.model.training
        steps = self.current_gradient_accumulation_steps if trains else 1
        if self.loss_type == "dapo":
            share = steps / self.args.steps_per_generation if trains else 1
            return made * (self.accelerator.num_processes / generated.clamp(min=1) / share)
        lengths = made.sum(1, keepdim=True)
        tokens = {
            "grpo": lengths * len(made),
            "bnpo": lengths.sum(),
            "dr_grpo": torch.tensor(self.max_completion_length * len(made)),
        }[self.loss_type]
        return made / tokens.clamp(min=1) / steps

    def _note(
        self, result: prime_kernels.PolicyLoss, made: Tensor, advantage: Tensor, old: Tensor | None, ref: Tensor | None
    ) -> None:
        """GRPOTrainer's metrics of a micro-batch."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        ratio = torch.ones_like(result.logprob) if old is None else (result.logprob - old).exp()
        low = (ratio < 1 - self.epsilon_low) & (advantage < 0)
        high = (ratio > 1 + self.epsilon_high) & (advantage > 0)
        values = {"entropy": result.entropy, "clip_ratio/low_mean": low, "clip_ratio/high_mean": high}
        values["clip_ratio/region_mean"] = low | high
        if self.beta:
            values["kl"] = (ref - result.logprob).expm1() - (ref - result.logprob)
        sums = torch.stack([*(value.sum().float() for value in values.values()), made.sum().float()])
        *sums, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        for name, total in zip(values, sums, strict=True):
            metrics[name].append(total / max(tokens, 1))
        for name, clipped, extreme in (("low_min", low, torch.min), ("high_max", high, torch.max)):
            shares = torch.zeros(made.shape, device=made.device).masked_scatter(made, clipped.float()).sum(1)
            metrics[f"clip_ratio/{name}"].append(float(extreme(self.accelerator.gather(shares / made.sum(1)))))

    # ---- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.prm is not None and self.prm.optimizer is not None:
            checkpoint = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            self.prm.save(checkpoint / "prm", self._tokenizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.prm is not None and self.prm.optimizer is not None:
            self.prm.load(Path(checkpoint, "prm"))


def _made(batch: dict[str, Any]) -> Tensor:
    """(B, C): tokens that the model made, not a tool."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


def _rows(batch: dict[str, Any]) -> Rows:
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    return Rows.of(*(batch[name] for name in names), _made(batch))
