"""Packs on several ranks each against packs on one: `torchrun ... shared_packs.py MODELS SEED` on several ranks raises
AssertionError naming what differs."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_optimizer_state
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from prime_fast import passes, prime
from prime_fast.config import EngineConfig, ModelConfig, OptimizerConfig, PolicyConfig
from prime_fast.engine import distributed, zero
from prime_fast.engine.batch import Batch, Group, Sample
from prime_fast.engine.zero import Engine
from prime_fast.stages.sft import accumulate_nll, response_nll

VOCABULARY = 41
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=256,
    initializer_range=0.2,  # attention that tells tokens apart
    bos_token_id=None,
    eos_token_id=1,
)
MODELS = {  # key-value heads that are split, copied to one rank each, and to several
    "llama, 4": LlamaConfig(**SHAPE, num_key_value_heads=4),
    "qwen2 tied, 2": Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3, 1": Qwen3Config(**SHAPE, num_key_value_heads=1, head_dim=16),
    "mistral of window 5, 2": MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=5),
}
LONGEST = 60  # tokens of a row
LR = 0.0
CASES = {  # ranks: (model, dtype, ranks to a pack, model.recompute)
    2: [("llama, 4", "float32", 2, "none"), ("qwen2 tied, 2", "bfloat16", 2, "all")],
    4: [
        ("qwen2 tied, 2", "float32", 4, "attention-saved"),
        ("qwen3, 1", "float32", 4, "all"),
        ("mistral of window 5, 2", "float32", 2, "none"),
    ],
}
# relative, in norm, of each parameter: float32 sums in another order; gradients that every rank rounds to bfloat16
BOUND = {"float32": 1e-5, "bfloat16": 2e-2}
# beside gradients of rounding alone, as one of a bias may be: a share of the model's whole gradient
FLOOR = 1e-3


def write_models(root: Path) -> None:
    torch.manual_seed(0)
    for name, config in MODELS.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)


def drawn(seed: int) -> Batch:
    """Groups of two rows of random lengths, one of them as long as may be, most of it prompt: a rank that shares it may
    have no response token."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> Tensor:
        length = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(0, VOCABULARY, (length,), generator=draw)

    groups = []
    for index in range(7):
        long = index == 3
        prompt = tuple((tokens(40, 41) if long else tokens(1, 14)).tolist())
        answers = [tokens(LONGEST - 39, LONGEST - 38) if long else tokens(1, 20), tokens(1, 20)]
        samples = tuple(Sample(answer, -3 + torch.randn(len(answer), generator=draw), False) for answer in answers)
        groups.append(Group(index, index, prompt, samples, tuple(torch.rand(2, generator=draw).tolist())))
    return Batch.of(groups)


def gradient(engine: Engine) -> list[Tensor]:
    """The last one, a tenth of which AdamW's first moments are; they are 0 again after."""
    made = [10 * safe_get_full_optimizer_state(p, "exp_avg") for p in engine.lm.parameters()]
    for state in engine.deepspeed.optimizer.optimizer.state.values():
        state["exp_avg"].zero_()
    return made


def results(path: Path, dtype: str, size: int, batch: Batch, recompute: str, device: torch.device) -> dict:
    """What the passes of a step and of SFT make of the batch with packs on `size` ranks: {name: tensors}."""
    model = ModelConfig(policy=str(path), dtype=dtype, recompute=recompute)
    settings = EngineConfig(sequence_parallel=size, micro_tokens=-(-LONGEST // size))
    engine = Engine("policy", str(path), model, settings, OptimizerConfig(lr=LR, grad_clip=0.0), device)
    budget, found = settings.micro_tokens, {}
    options = {"attention": engine.attention, "sequence_parallel": size}
    (mini,) = minis = passes.split(batch, 1000, budget, **options)
    assert max(batch.lengths) == LONGEST > len(mini) > 1
    for temperature, logprob in passes.score_at(engine, batch, minis, (1.0, 0.7)).items():
        found[f"log-probs at {temperature}"] = [logprob]
    draw = torch.Generator().manual_seed(2)
    ref, advantage = -3 + torch.randn(2, len(logprob), generator=draw)

    odds = prime.prm_intercept(batch.outcome, batch.group)
    for name, intercept, prefixes in (("PRM", odds, False), ("PRM of prefixes", odds, True)):
        prm_logprob, score, loss = torch.zeros_like(ref), torch.zeros(len(batch.responses)), torch.zeros(())
        row_weight = torch.full_like(score, distributed.world_size() / len(score))
        rows = {"beta": 0.05, "row_weight": row_weight, "intercept": intercept, "every_prefix": prefixes}
        for micro in mini:
            pack = passes.pack_here(batch, micro, engine)
            made = passes.train_prm_pack(engine, pack, ref, batch.outcome, **rows)
            pack.put(prm_logprob, made.logprob)
            pack.put_rows(score, made.score)
            loss += made.loss.detach()
        found |= {f"{name} log-probs": [distributed.sum_(prm_logprob)], f"{name} scores": [distributed.sum_(score)]}
        grad_norm = torch.tensor(engine.step(LR).grad_norm)
        found |= {f"{name} gradient": gradient(engine), f"{name} loss": [distributed.sum_(loss), grad_norm]}

    policy = passes.train_policy(
        engine,
        replace(batch, engine_logprob=logprob + passes.AGREEMENT[engine.dtype] / 2 * (advantage > 0)),
        minis,
        advantage,
        old_logprob=None,
        own_first=True,
        ref_logprob=ref,
        importance_cap=1.00001,
        temperature=temperature,
        top_p=1.0,
        config=PolicyConfig(entropy_coef=0.01, kl_coef=0.1, mean="row"),
        lr=LR,
    )
    found["policy gradient"] = gradient(engine)
    means = policy.entropy, policy.clip_fraction, policy.reference_kl, policy.mismatch["importance_cut"]
    found["policy loss and means"] = list(torch.tensor([*policy.updates, *means]))

    rows = batch.prompts, batch.responses, budget
    found["NLL"] = [torch.tensor([accumulate_nll(engine, *rows), response_nll(engine, *rows)])]
    assert engine.step(LR).applied
    found["NLL gradient"] = gradient(engine)
    return found


def differences(one: dict, many: dict, bound: float) -> list[str]:
    """Relative errors in norm of what differs by more than the bound."""
    wrong = []
    for name, expected in one.items():
        floor = FLOOR * torch.cat([x.flatten() for x in expected]).norm() if "gradient" in name else 0.0
        for index, (exact, got) in enumerate(zip(expected, many[name], strict=True)):
            error = float((got - exact).norm() / exact.norm().clamp(min=max(floor, 1e-12)))
            if not error <= bound:
                wrong.append(f"{name} {index}: {error:.2g}")
    return wrong


def check(models: Path, seed: int, device: torch.device) -> None:
    ranks, batch = distributed.world_size(), drawn(seed)
    for name, dtype, size, recompute in CASES[ranks]:
        one, many = (
            results(models / name, dtype, n, batch, setting, device) for n, setting in ((1, "none"), (size, recompute))
        )
        wrong = differences(one, many, BOUND[dtype])
        assert not wrong, f"{name} {dtype}, {size} of {ranks} ranks, seed {seed}: {wrong}"


if __name__ == "__main__":
    check(Path(sys.argv[1]), int(sys.argv[2]), zero.start())
    print(f"{distributed.world_size()} ranks agree", flush=True)
