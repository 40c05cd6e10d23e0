"""What engines do on machines with GPUs, where torch.cuda answers like one: this machine has none.

What is real here: the host code of the trainer's side, and vLLM's own Executor of the installed version. Not real: the
GPU, and what vLLM maps on it.
"""

import ast
import gc
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from engines import needs_vllm
from rich.console import Console

import prime_fast
from prime_fast.engine import distributed
from prime_fast.engine.batch import Sample
from prime_fast.evaluation import evaluate
from prime_fast.metrics import Phases
from prime_fast.rewards.pool import Verdict
from prime_fast.rollout import EngineDied, Request, RolloutEngine, make_engine, process
from prime_fast.rollout.collect import Collector
from prime_fast.rollout.fleet import Fleet
from prime_fast.rollout.verify import Verifier
from prime_fast.rollout.vllm import VLLMEngine, WeightReceiver
from prime_fast.rollout.weights import Entry, checksum

GIB = 1 << 30


@pytest.fixture
def events(monkeypatch):
    """Two GPUs of 80 GiB of which 44 are free; what is asked of torch.cuda, in order."""
    events = []
    answers = {"is_available": lambda: True, "device_count": lambda: 2, "mem_get_info": lambda: (44 * GIB, 80 * GIB)}
    answers |= {"ipc_collect": lambda: None, "empty_cache": lambda: events.append("release")}
    answers |= {"synchronize": lambda: events.append("synchronize")}
    monkeypatch.setattr(gc, "collect", lambda: 0)  # slow in a process of so many tests
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "VLLM_CACHE_ROOT", *process.ALLOCATOR):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(process, "check_installed", lambda: None)
    return events


class Recorder(RolloutEngine):
    """Notes what is asked of it; dies at the first call of `mortal`."""

    concurrent = True

    def __init__(self, events, mortal=None, forgets=True):
        self.events, self.mortal, self.forgets = events, mortal, forgets

    def note(self, name, *arguments):
        if name == self.mortal:
            self.mortal = None
            raise EngineDied(f"lost at {name}")
        self.events.append(" ".join([name, *map(str, arguments)]))

    def submit(self, request):
        self.note("submit", request.key)

    def step(self):
        self.note("step")
        return []

    def load_weights(self, weights):
        self.note("load")

    def sleep(self):
        self.note("sleep")

    def wake(self):
        self.note("wake")

    def ready(self):
        self.note("ready")

    def restart(self, room):
        self.note("restart", room)


WAKE = ["release", "wake", "load", "release", "ready"]
RESTART = ["release", "restart 0.5", "load", "release"]  # (44 GiB - 4 GiB of reserve) / 80 GiB
CYCLES = {
    None: ["submit 7", "step", "sleep", *WAKE],
    "submit": [*RESTART, "ready", "submit 7", "step", "sleep", *WAKE],
    "step": ["submit 7", *RESTART, "ready", "submit 7", "sleep", *WAKE],
    "sleep": ["submit 7", "step", *RESTART, "sleep", *WAKE],
    "wake": ["submit 7", "step", "sleep", "release", *RESTART, *WAKE[1:]],
    "load": ["submit 7", "step", "sleep", "release", "wake", *RESTART, *WAKE[3:]],
    "ready": ["submit 7", "step", "sleep", *WAKE[:4], *RESTART, "ready"],
}


@pytest.mark.parametrize("mortal", CYCLES)
def test_memory_is_given_back_before_an_engine_maps_its_own(mortal, events):
    """Around each death too; an engine that is to sleep, or to take weights, does not map its cache before."""
    fleet = Fleet(Recorder(events, mortal), lambda: iter([]))
    fleet.submit([Request(7, [2], [0], 4, 1.0)])
    fleet.step()
    fleet.pending.clear()
    fleet.sleep()
    fleet.wake(changed=True)
    assert events == CYCLES[mortal]


@pytest.mark.parametrize("forgets", [True, False])
def test_an_engine_that_forgets_gets_its_weights_after_a_skipped_step_too(forgets, events):
    fleet = Fleet(Recorder(events, forgets=forgets), lambda: iter([]))
    fleet.wake(changed=False)  # it did not sleep
    assert events == []
    fleet.sleep()
    fleet.wake(changed=False)
    assert events == ["sleep", *(call for call in WAKE if forgets or call != "load")]


class Memory:
    """Which parts vLLM has mapped; `collective_rpc` is how its Executor reaches the workers."""

    def __init__(self):
        self.mapped = {"weights", "kv_cache"}

    def collective_rpc(self, method, kwargs):
        assert method in ("sleep", "wake_up")
        self.mapped = set() if method == "sleep" else self.mapped | set(kwargs["tags"] or ("weights", "kv_cache"))


class Executor25(Memory):
    """The tags of vLLM 0.25.1 (v1/executor/abstract.py), where a partial wake leaves `is_sleeping` set."""

    is_sleeping, sleeping_tags = False, frozenset()

    def sleep(self, level, mode):
        if not self.is_sleeping:
            self.collective_rpc("sleep", kwargs={"level": level})
            self.sleeping_tags, self.is_sleeping = {"weights", "kv_cache"}, True

    def wake_up(self, tags):
        if self.is_sleeping and set(tags) <= self.sleeping_tags:
            self.collective_rpc("wake_up", kwargs={"tags": tags})
            self.sleeping_tags -= set(tags)
            self.is_sleeping = bool(self.sleeping_tags)


def installed_executor():
    from vllm.v1.executor.abstract import Executor

    class Installed(Memory):
        wake_up, is_sleeping = Executor.wake_up, Executor.__dict__.get("is_sleeping", False)

        def __init__(self):
            super().__init__()
            self.sleeping_tags = set()

        def sleep(self, level, mode):
            assert mode == "keep"
            Executor.sleep(self, level)

    return Installed()


def assert_sleep_frees_everything(llm):
    engine = object.__new__(VLLMEngine)
    engine.llm, engine.sleep_level, engine.asleep = llm, 2, []
    for _ in range(2):
        engine.sleep()
        assert llm.mapped == set()
        engine.wake()
        assert llm.mapped == {"weights"}
        engine.sleep()  # nothing was generated in between
        assert llm.mapped == set()
        engine.sleep()
        engine.wake()
        engine.ready()
        assert llm.mapped == {"weights", "kv_cache"}


def test_sleep_frees_everything_whatever_was_woken_before():
    """Memory as recorded in the workers' place, because CPU workers map nothing."""
    assert_sleep_frees_everything(Executor25())


def test_sleep_frees_everything_with_the_installed_vllm():
    """In a process of its own, for importing vLLM changes torch."""
    needs_vllm()
    code = "import test_life_cycle as t; t.assert_sleep_frees_everything(t.installed_executor())"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    result = processes.run([sys.executable, "-c", code], env=processes.environment(PYTHONPATH=path))
    assert result.returncode == 0, result.stderr[-2000:]


def gpu_engine(monkeypatch, configure, *overrides, rank=0, ranks=1):
    """The engine that a rank starts, as far as its process: (engine, settings of each start)."""
    starts = []
    monkeypatch.setattr(process.EngineProcess, "start", lambda self, settings: starts.append(settings))
    monkeypatch.setattr(process.EngineProcess, "finalizer", lambda self: None, raising=False)
    monkeypatch.setattr(process.EngineProcess, "_call", lambda self, verb: None)
    monkeypatch.setattr(distributed, "local_world_size", lambda: ranks)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    config = configure("rollout.engine=vllm", *overrides)
    return make_engine(config, config.model.policy, [1], torch.bfloat16, distributed.device()), starts


def test_each_engine_compiles_in_a_place_of_its_own(events, monkeypatch, configure):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,MIG-b/1/0")
    places = []
    for rank in (0, 1, 0):
        engine, _ = gpu_engine(monkeypatch, configure, rank=rank, ranks=2)
        environment = engine._environment()
        assert environment["CUDA_VISIBLE_DEVICES"] == ["GPU-a", "MIG-b/1/0"][rank]
        places.append(Path(environment["VLLM_CACHE_ROOT"]))
    assert places[0] == places[2] != places[1] and len({place.parent for place in places}) == 1
    assert places[0].is_relative_to(Path.home() / ".cache" / "vllm") and events == ["release"] * 3
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/somewhere")
    assert engine._environment()["VLLM_CACHE_ROOT"].startswith("/somewhere/")


def test_engines_beside_the_trainer_sleep_and_restart_in_what_is_free(events, monkeypatch, configure):
    engine, starts = gpu_engine(monkeypatch, configure)
    assert engine.forgets and starts[0]["sleep_level"] == 2 and "gpu_memory_utilization" not in starts[0]["options"]
    for room in (0.3, 0.7):
        engine.restart(room)
    assert [start["options"].get("gpu_memory_utilization") for start in starts] == [None, 0.3, None]
    engine, starts = gpu_engine(monkeypatch, configure, "rollout.vllm={gpu_memory_utilization: 0.6, sleep_level: 1}")
    engine.restart(0.4)
    assert [start["options"]["gpu_memory_utilization"] for start in starts] == [0.6, 0.4]
    assert not engine.forgets and starts[0]["sleep_level"] == 1


def test_engines_on_gpus_of_their_own_do_not_sleep(events, monkeypatch, configure):
    engine, starts = gpu_engine(monkeypatch, configure, "rollout.vllm={gpus: [1]}")
    assert not engine.forgets and engine.gpus == ["1", "0"] and engine.source == 1
    engine.restart(0.3)  # what the trainer leaves free elsewhere is not its concern
    assert [(start["sleep_level"], start["options"]) for start in starts] == [(0, {"gpu_memory_utilization": 0.9})] * 2
    llm = Memory()
    engine = object.__new__(VLLMEngine)
    engine.llm, engine.sleep_level, engine.asleep = llm, 0, []
    engine.sleep()
    engine.wake()
    engine.ready()
    assert llm.mapped == {"weights", "kv_cache"}


@pytest.mark.parametrize(("gpus", "wrong"), [([0], 0), ([1, 2], 2)])
def test_gpus_that_an_engine_cannot_have(gpus, wrong, events, monkeypatch, configure):
    with pytest.raises(ValueError, match=f"rollout.vllm.gpus names GPU {wrong}, but the trainer has 0 to 0 of the 2"):
        gpu_engine(monkeypatch, configure, f"rollout.vllm={{gpus: {gpus}}}")


@pytest.mark.parametrize("name", process.ALLOCATOR)
def test_expandable_segments_are_refused(name, events, monkeypatch, configure):
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    with pytest.raises(ValueError, match=f"^{name} asks for expandable segments, .* set rollout.engine=hf$"):
        gpu_engine(monkeypatch, configure)
    monkeypatch.setenv(name, "expandable_segments:False")
    gpu_engine(monkeypatch, configure)


def test_an_evaluation_finds_its_gpu_and_needs_no_weights(events, monkeypatch, workspace, tmp_path):
    """So that it neither sleeps nor minds how the trainer's memory is allocated."""
    monkeypatch.setenv(process.ALLOCATOR[0], "expandable_segments:True")
    started = []
    monkeypatch.setattr(process.EngineProcess, "start", lambda self, settings: started.append(self))
    monkeypatch.setattr(distributed, "initialize", distributed.device)  # no process group over NCCL can be had here
    paths = {"model": str(workspace / "model"), "data": (str(workspace / "rows.jsonl"),), "out": tmp_path / "out"}
    settings = evaluate.Settings(**paths, engine="vllm", max_response=8, reward=f"{workspace}/reward.py:compute_score")
    monkeypatch.setattr(process.EngineProcess, "submit", lambda self, request: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(process.EngineProcess, "finalizer", lambda self: None, raising=False)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(settings, Console(quiet=True))
    assert started[0].device == torch.device("cuda", 0) and started[0].gpus == ["0"]
    assert started[0].settings["sleep_level"] == 0


def names_cuda_alone(node: ast.AST) -> bool:
    """`torch.device(<"cuda" somewhere>)` or `device=<"cuda" somewhere>`, without an index."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.device" and len(node.args) == 1:
        return any(isinstance(part, ast.Constant) and part.value == "cuda" for part in ast.walk(node.args[0]))
    return isinstance(node, ast.keyword) and node.arg == "device" and ast.unparse(node.value) == repr("cuda")


def test_no_device_is_without_its_index():
    """It would have to stay where it is made: `torch.device("cuda").index` is None."""
    for path in Path(prime_fast.__file__).parent.rglob("*.py"):
        assert not [node.lineno for node in ast.walk(ast.parse(path.read_text())) if names_cuda_alone(node)], path


def test_a_bucket_from_another_gpu_is_fetched_before_it_is_read(events, monkeypatch):
    """The copy to the worker's own GPU is recorded, not made."""
    moved, loaded = [], {}

    def to(self, device):
        moved.append(device)
        return self.clone()  # what is read below is the copy

    monkeypatch.setattr(torch.Tensor, "to", to)
    far = torch.arange(8, dtype=torch.float32).view(torch.uint8)
    receiver = WeightReceiver()
    receiver.device, receiver.received, receiver.loaded = torch.device("cuda", 1), {}, set()
    receiver.model_runner = SimpleNamespace(model=SimpleNamespace(load_weights=loaded.update))
    receiver.load_bucket([Entry("w", torch.float32, (8,), 0, 32)], (lambda bucket: bucket, (far,)))
    assert moved == [torch.device("cuda", 1)] and events == ["synchronize"]
    assert loaded["w"].untyped_storage().data_ptr() != far.untyped_storage().data_ptr()
    assert receiver.received == {"w": checksum(loaded["w"])}


class SlowPool:
    """Outcomes after a second."""

    def judge(self, responses, rows):
        time.sleep(1.0)
        return [Verdict(1.0)] * len(responses)


def test_a_rank_without_work_does_not_keep_the_others_waiting(configure):
    """Its outcomes take a second; meanwhile it meets the other ranks, whose engines may need new prompts."""
    fleet = SimpleNamespace(pending={}, concurrent=True, step=list, version=0, patience=0.2)
    collector = Collector(configure().rollout, 0, [None], fleet, SlowPool(), None)
    collector.rows_in_work[3] = 0, {}
    sample = Sample(torch.tensor([1]), torch.tensor([-1.0]), False)
    collector.verifier.put((3, 0, (2,), (sample,)), ["text"], {})
    ticks = 0
    while not collector.arrived:
        collector._tick(Phases())
        ticks += 1
    assert ticks > 3 and collector.arrived[3].outcomes == (1.0,)
    collector.close()


def test_a_verifier_waits_for_everything_where_it_is_to():
    verifier = Verifier(SlowPool())
    verifier.put("a", ["x", "y"], {})
    assert verifier.take(0.0).done == []
    verifier.put("b", ["z"], {})
    right = Verdict(1.0)
    assert verifier.take(None).done == [("a", [right] * 2), ("b", [right])] and verifier.take(None).done == []
    verifier.close()
