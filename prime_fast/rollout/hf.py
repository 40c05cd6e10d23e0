"""The embedded rollout engine: a Hugging Face model with a KV cache, batched, in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from prime_fast.data.models import source
from prime_fast.engine import interrupt
from prime_fast.engine.batch import Sample
from prime_fast.progress import moved
from prime_fast.rollout import EngineError, Request, RolloutEngine

COMPACT_BELOW = 0.75  # drop finished sequences from the cache once fewer than this share is still running


class HFEngine(RolloutEngine):
    """Prompts are prefilled once and their cache is repeated for the samples; finished sequences leave the batch."""

    def __init__(
        self, path: str, eos_ids: Sequence[int], *, dtype: torch.dtype, device: torch.device, batch: int = 256
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            **source(path), use_safetensors=True, dtype=dtype, attn_implementation="sdpa"
        )
        self.model.to(device).eval().requires_grad_(False)
        self.device, self.batch = device, batch
        self.eos = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)
        self.waiting: list[Request] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        missing = dict(self.model.named_parameters())
        for name, tensor in weights:
            if name not in missing:
                raise EngineError(f"the rollout engine has no parameter {name}; its model and the trainer's differ")
            missing.pop(name).data.copy_(tensor)
        if missing:
            raise EngineError(
                f"{len(missing)} parameters of the rollout engine got no weights, among them {min(missing)}"
            )

    def sleep(self) -> None:
        if self.device.type == "cuda":
            self.model.to("cpu")
            torch.cuda.empty_cache()

    def wake(self) -> None:
        self.model.to(self.device)

    def close(self) -> None:
        del self.model

    def submit(self, request: Request) -> None:
        self.waiting.append(request)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, list[Sample]]]:
        """Decode one batch to its end: the longest prompts, for what does not fit shows at once."""
        self.waiting.sort(key=lambda request: (len(request.prompt), request.key))
        if not self.waiting:
            return []
        chosen = [self.waiting.pop()]
        count, like = len(chosen[0].seeds), _sampling(chosen[0])
        while self.waiting and count + len(self.waiting[-1].seeds) <= self.batch:
            if _sampling(self.waiting[-1]) != like:
                break
            chosen.append(self.waiting.pop())
            count += len(chosen[-1].seeds)
        made = list(self._decode([request.prompt for request in chosen], [request.seeds for request in chosen], *like))
        if not made:
            self.waiting += chosen
            return []
        samples = iter(made)
        return [(request.key, [next(samples) for _ in request.seeds]) for request in chosen]

    def _decode(self, prompts, seeds, max_tokens: int, temperature: float, top_p: float) -> Iterator[Sample]:
        """Yields a Sample per (prompt, seed) in order; none if the run is asked to leave meanwhile."""
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        cache = DynamicCache()
        logits = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp_(min=0), cache)

        repeats = torch.tensor([len(row) for row in seeds], device=self.device)
        owner = torch.arange(len(prompts), device=self.device).repeat_interleave(repeats)
        cache.batch_select_indices(owner)
        logits, mask = logits[owner], mask[owner]
        draws = torch.stack([_uniform(seed, max_tokens) for row in seeds for seed in row]).to(self.device)
        position = mask.sum(1)

        count = len(owner)
        tokens = torch.zeros(count, max_tokens, dtype=torch.int64, device=self.device)
        logprob = torch.zeros(count, max_tokens, device=self.device)
        length = torch.full((count,), max_tokens, device=self.device)
        stopped = torch.zeros(count, dtype=torch.bool, device=self.device)
        running = torch.arange(count, device=self.device)  # which sequence each cache row belongs to
        for step in range(max_tokens):
            moved()
            if interrupt.asked():
                return
            chosen, chosen_logprob = _sample(logits, draws[running, step], temperature, top_p)
            tokens[running, step], logprob[running, step] = chosen, chosen_logprob
            ends = torch.isin(chosen, self.eos) & ~stopped[running]
            length[running[ends]] = step + 1
            stopped[running[ends]] = True
            alive = ~stopped[running]
            left = int(alive.sum())
            if left == 0 or step + 1 == max_tokens:
                break
            if left < COMPACT_BELOW * len(running):
                keep = alive.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                running, mask, chosen = running[keep], mask[keep], chosen[keep]
            mask = torch.cat([mask, mask.new_ones(len(running), 1)], 1)
            logits = self._forward(chosen[:, None], mask, (position[running] + step)[:, None], cache)

        lengths, ended = length.tolist(), stopped.tolist()
        tokens, logprob = tokens.cpu(), logprob.cpu()
        for i in range(count):
            yield Sample(tokens[i, : lengths[i]].clone(), logprob[i, : lengths[i]].clone(), not ended[i])

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits of the last position, (B, V) float32."""
        return (
            self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )


def _sampling(request: Request) -> tuple[int, float, float]:
    """What requests that are decoded together have in common."""
    return request.max_tokens, request.temperature, request.top_p


def _sample(logits: Tensor, draws: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: logits (B, V), draws (B,) in [0, 1) -> token (B,), log-prob after temperature and top-p."""
    if temperature == 0:
        logprob = logits.log_softmax(-1)
        chosen = logits.argmax(-1)
    else:
        logits = logits / temperature
        logprob = (logits if top_p == 1 else _nucleus(logits, top_p)).log_softmax(-1)
        cumulative = logprob.double().exp().cumsum(-1)
        total = cumulative[:, -1:].contiguous()
        chosen = torch.searchsorted(cumulative, draws[:, None] * total, right=True)
        chosen = chosen.minimum(torch.searchsorted(cumulative, total))[:, 0]  # the last token that has a probability
    return chosen, logprob.gather(1, chosen[:, None])[:, 0]


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits (B, V) with -inf outside the smallest set of tokens whose probabilities add up to top_p, as in vLLM: from
    the least probable on, what adds up to 1 - top_p goes."""
    ascending, index = logits.sort(-1)
    out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    out[:, -1] = False
    return logits.scatter(-1, index, ascending.masked_fill_(out, -torch.inf))


def _uniform(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
