"""The policy loss of an OpenRLHF-style actor without logits.

OpenRLHF trains with two parts: `Actor.forward` gives the log-probs of the actions, `PolicyLoss.forward` makes a loss
of them. `Actor` and `PolicyLoss` here do the same as those with the arguments that matter. The fused two take their
places and leave the loop between them as it is: the actor hands on hidden states, and the loss runs the LM head, a few
rows of logits at a time. Under ZeRO-3 the loss must run within the model's forward, where the head's weight is whole.
`python examples/openrlhf_actor.py` computes a step with either and prints how far apart they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import prime_kernels


class Actor(nn.Module):
    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, sequences: Tensor, action_mask: Tensor, attention_mask: Tensor) -> Tensor:
        """sequences (B, S), action_mask (B, A) of the last A tokens -> log-probs (B, A)."""
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        logits = self.model(sequences, attention_mask=attention_mask, position_ids=positions).logits / self.temperature
        logprob = logits[:, :-1].float().log_softmax(-1).gather(-1, sequences[:, 1:, None])[..., 0]
        return logprob[:, -action_mask.shape[1] :] * action_mask


class PolicyLoss(nn.Module):
    def __init__(self, clip_eps_low: float = 0.2, clip_eps_high: float = 0.2) -> None:
        super().__init__()
        self.low, self.high = clip_eps_low, clip_eps_high

    def forward(self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor) -> Tensor:
        ratio = (log_probs - old_log_probs).exp()
        loss = -torch.min(ratio * advantages, ratio.clamp(1 - self.low, 1 + self.high) * advantages)
        return (loss * action_mask).sum() / action_mask.sum()


class States(NamedTuple):
    """What stands in the place of log-probs: all that gives them."""

    hidden: Tensor  # (N, H), of the N actions, row after row
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,)
    temperature: float


class FusedActor(Actor):
    def forward(self, sequences: Tensor, action_mask: Tensor, attention_mask: Tensor) -> States:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        out = self.model.base_model(sequences, attention_mask=attention_mask, position_ids=positions)
        actions, chosen = action_mask.shape[1], action_mask.bool()
        hidden = out.last_hidden_state[:, -actions - 1 : -1][chosen]
        return States(hidden, self.model.lm_head.weight, sequences[:, -actions:][chosen], self.temperature)


class FusedPolicyLoss(PolicyLoss):
    def forward(self, log_probs: States, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor) -> Tensor:
        hidden, weight, targets, temperature = log_probs
        chosen = action_mask.bool()
        token_weight = torch.full(targets.shape, 1 / len(targets), device=hidden.device)
        return prime_kernels.linear_policy_loss(
            hidden, weight, targets, old_log_probs[chosen], advantages[chosen], token_weight,
            clip_low=self.low, clip_high=self.high, temperature=temperature,
        ).loss  # fmt: skip


def main() -> dict[str, float]:
    """Relative differences of the losses and of the gradients."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **size))
    sequences = torch.randint(1000, (6, 24))
    attention_mask = torch.arange(24) >= torch.randint(0, 6, (6, 1))  # prompts are padded on the left
    lengths = torch.randint(1, 17, (6, 1))
    action_mask = (torch.arange(16) < lengths).long()
    attention_mask[:, -16:] &= action_mask.bool()
    with torch.no_grad():
        old_log_probs = Actor(model, 0.8)(sequences, action_mask, attention_mask) + 0.3 * torch.randn(6, 16)
    advantages, found = torch.randn(6, 16), []
    for actor, loss_fn in ((Actor(model, 0.8), PolicyLoss()), (FusedActor(model, 0.8), FusedPolicyLoss())):
        model.zero_grad()
        loss = loss_fn(actor(sequences, action_mask, attention_mask), old_log_probs, advantages, action_mask)
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, gradient), (fused_loss, fused_gradient) = found
    apart = {"loss": (loss - fused_loss).abs() / loss.abs(), "gradient": (gradient - fused_gradient).norm()}
    apart["gradient"] /= gradient.norm()
    for name, difference in apart.items():
        print(f"{name}: {float(difference):.1e} apart")
    return {name: float(difference) for name, difference in apart.items()}


if __name__ == "__main__":
    main()
