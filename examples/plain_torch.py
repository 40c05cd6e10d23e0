"""RLOO with an online implicit PRM in one file: plain torch, a model of transformers, and prime_kernels.

The outcome of a response is the share of even digits among its eight. Each step prints the mean, which rises from 0.5.
"""

import copy
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import prime_kernels

PROMPTS, SAMPLES, LENGTH, DIGITS = 16, 4, 8, 10
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def states(model, rows):
    """(N, H): the hidden states that predict the N response tokens, row after row."""
    return model.model(rows).last_hidden_state[:, -LENGTH - 1 : -1].flatten(0, 1)


def update(optimizer, loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def main(steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=DIGITS, eos_token_id=None, **SIZE))
    prm, reference = copy.deepcopy(policy), copy.deepcopy(policy).requires_grad_(False)
    policy_adam, prm_adam = (torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (policy, prm))
    count = PROMPTS * SAMPLES
    cu_seqlens = LENGTH * torch.arange(count + 1, dtype=torch.int32)
    group = torch.arange(PROMPTS).repeat_interleave(SAMPLES)
    token_weight = torch.full((count * LENGTH,), 1 / (count * LENGTH))
    rewards = []
    for step in range(steps):
        prompts = torch.randint(DIGITS, (PROMPTS, 1)).repeat_interleave(SAMPLES, 0)
        rows = policy.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=LENGTH, do_sample=True)
        responses = rows[:, 1:]
        targets, outcome = responses.flatten(), (responses % 2 == 0).float().mean(1)
        with torch.no_grad():
            ref_logprob = prime_kernels.linear_logprob(states(reference, rows), reference.lm_head.weight, targets)
        head = states(prm, rows), prm.lm_head.weight, targets
        scored = prime_kernels.linear_prm_loss(*head, ref_logprob, outcome, cu_seqlens)
        update(prm_adam, scored.loss)
        found = prime_kernels.prime_advantage(scored.logprob, ref_logprob, outcome, cu_seqlens, group)
        head = states(policy, rows), policy.lm_head.weight, targets
        update(policy_adam, prime_kernels.linear_policy_loss(*head, None, found.advantage, token_weight).loss)
        rewards.append(float(outcome.mean()))
        print(f"step {step}: outcome {rewards[-1]:.2f}, PRM loss {scored.loss.item():.4f}")
    return rewards


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
