"""What PrimeTrainer is told, and what of GRPOConfig it cannot do."""

from dataclasses import dataclass
from math import inf
from typing import Any

from trl import GRPOConfig

LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo")
# GRPOConfig's option: the one value that can be honoured, and why no other
ONLY: dict[str, tuple[Any, str]] = {
    "scale_rewards": ("none", "advantage_estimator says how outcomes are compared"),
    "multi_objective_aggregation": ("sum_then_normalize", "the PRM learns from one outcome, the sum of all rewards"),
    "mask_truncated_completions": (False, "a completion without tokens has none to reward"),
    "importance_sampling_level": ("token", "the fused loss clips the ratio of each token"),
    "delta": (None, "the fused loss clips a ratio at epsilon alone"),
    "top_entropy_quantile": (1.0, "the fused loss is over all tokens"),
    "off_policy_mask_threshold": (None, "the fused loss is over all rows"),
    "use_bias_correction_kl": (False, "the fused loss adds the KL estimate without a ratio"),
    "use_adaptive_entropy": (False, "the fused loss has a constant entropy_coef"),
    "cast_lm_head_to_fp32": (False, "the fused loss sums and exponentiates in float32 already"),
    "fp16": (False, "the PRM's optimizer scales no losses; bf16=True needs none"),
}


@dataclass
class PrimeConfig(GRPOConfig):
    """GRPOConfig, and what PRIME adds. `beta` and `epsilon` are TRL's: KL coefficient and clip of the policy."""

    scale_rewards: str = "none"
    use_bias_correction_kl: bool = False

    prm_beta: float = 0.05  # a token's reward is prm_beta * log-ratio of PRM and reference
    prm_update: str = "after"  # after, before (scored again once trained) or none, for a PRM that was trained elsewhere
    prm_learning_rate: float = 1e-6
    prm_weight_decay: float = 0.0
    prm_max_grad_norm: float = 10.0
    prm_batch_size: int | None = None  # completions per optimizer step, on all processes; None: as the policy's
    process_weight: float = 1.0  # 0: no PRM at all
    outcome_weight: float = 1.0
    advantage_estimator: str = "rloo"  # these four are of prime_kernels.prime_advantage
    advantage_form: str = "run"
    advantage_normalize: str = "batch"
    advantage_whiten: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (only, why) in ONLY.items():
            if (value := getattr(self, name)) != only:
                raise ValueError(f"{name}={value!r} is not possible with PrimeTrainer: {why}; set {name}={only!r}")
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"loss_type={self.loss_type!r} is no PPO-clip loss; set it to one of {', '.join(LOSS_TYPES)}"
            )
        if self.entropy_coef and self.loss_type != "bnpo":
            raise ValueError(
                f"entropy_coef={self.entropy_coef} is not possible with PrimeTrainer and loss_type={self.loss_type!r}: "
                "the fused loss weighs entropies as the rest of it; set loss_type='bnpo', or entropy_coef=0.0"
            )
        if self.prm_update not in ("after", "before", "none"):
            raise ValueError(f"prm_update is {self.prm_update!r}, needs 'after', 'before' or 'none'")
        if not 0 < self.prm_beta < inf:
            raise ValueError(f"prm_beta is {self.prm_beta}, needs a number above 0, or the PRM learns nothing")
        for name in ("process_weight", "outcome_weight"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} is {getattr(self, name)}, needs a number that is not below 0")
        if self.prm_batch_size is None:
            self.prm_batch_size = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        if (
            self.prm_batch_size < 1
            or self.prm_batch_size % self.world_size
            or self.generation_batch_size % self.prm_batch_size
        ):
            raise ValueError(
                f"prm_batch_size={self.prm_batch_size} must be a multiple of the {self.world_size} processes and "
                f"divide generation_batch_size={self.generation_batch_size}; set another prm_batch_size"
            )
