"""Every phase counts what it must, against numbers from gpu reviews of the same configuration; plans are monotone."""

import random
from itertools import product
from pathlib import Path

import pytest

from prime_fast.config import load_config
from prime_fast.memory import states
from prime_fast.memory.advice import CARDS, UTILIZATION, _settings, apply, card_bytes, mend
from prime_fast.memory.items import GIB, pinned, total
from prime_fast.memory.plan import Plan, alone

ROOT = Path(__file__).parents[2]
SHIPPED = {  # config: (shape, ranks)
    "eurus2-7b-8xa100": ("qwen2.5-math-7b", 8),
    "qwen2.5-1.5b-1xa100": ("qwen2.5-1.5b", 1),
}
A100 = card_bytes("a100-80")
SHARED = "engine.sequence_parallel=4"


def shipped(name, *overrides):
    return load_config(
        ROOT / "configs" / f"{name}.yaml", [f"model.policy={ROOT}/configs/shapes/{SHIPPED[name][0]}", *overrides]
    )


def seven(*overrides, ranks=8, card=A100):
    """With everything chosen by hand."""
    given = ("model.recompute=all", "engine.park=false", "rollout.vllm={gpu_memory_utilization: 0.45}")
    return Plan(shipped("eurus2-7b-8xa100", *given, *overrides), ranks, card)


def gib(plan, phase, name, where="GPU"):
    return sum(item.size for item in plan.phases[phase] if item.name.endswith(name) and item.where == where) / GIB


@pytest.fixture
def summed_in_bfloat16(monkeypatch):
    """Gradients as they were summed once, and as DeepSpeed does by default."""
    config = states.deepspeed_config
    more = {"data_types": {"grad_accum_dtype": "bf16"}}
    monkeypatch.setattr(states, "deepspeed_config", lambda *arguments: config(*arguments) | more)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_configurations_fit_their_card(name):
    plan = Plan(shipped(name), SHIPPED[name][1], A100)
    assert plan.config.rollout.engine == "vllm"
    assert plan.fits and plan.left > 2 * GIB and plan.rollout.sequences > 32
    assert mend(Plan(plan.config, plan.ranks, plan.card // 2)) is not None


@pytest.mark.parametrize(
    ("phase", "name", "expected"),
    [
        ("policy", "reduce bucket", 2 * 0.93),  # of policy and PRM: 5e8 bfloat16 elements each
        ("policy step", "flat float32 gradient", 3.55),
        ("policy step", "gradients", 2 * 3.55),
        ("prm", "activations", 3.39),
        ("policy", "gathered parameters", 1.86),  # stage3_max_live_parameters
        ("generate", "weights, graphs and KV cache", 0.45 * 79.1),
        ("generate", "CUDA context", 1.2),  # the trainer's and vLLM's
        ("policy", "CUDA graphs", 1.0),  # of the sleeping engine
        ("policy", "NCCL", 1.0),
        ("sync", "weights, graphs and KV cache", 0.45 * 79.1),  # at its end
        ("checkpoint", "gathered for export", 1.02),
    ],
)
def test_what_the_published_run_holds(phase, name, expected):
    assert gib(seven(), phase, name) == pytest.approx(expected, rel=0.01)


def test_gradients_summed_in_bfloat16_are_flattened_before_they_are_converted(summed_in_bfloat16):
    assert gib(seven(), "policy step", "flat float32 gradient") == pytest.approx(3.5 + 1.8, rel=0.01)
    assert gib(seven(), "policy step", "gradients") == pytest.approx(2 * 1.77, rel=0.01)


def test_a_sync_has_no_cache_beside_its_buckets():
    first, then = seven().moments["sync"]
    sizes = {item.name: item.size / GIB for item in first}
    assert sizes["vLLM: weights"] == pytest.approx(14.19, rel=0.01)
    assert sizes["vLLM: weight-sync buckets"] == pytest.approx(
        2 * 0.5 + 2 * 1.02, rel=0.01
    )  # head, embedding: own ones
    assert sizes["policy: parameters gathered for export"] == pytest.approx(1.02, rel=0.01)
    assert not {"vLLM: weights", "vLLM: weight-sync buckets"} & {item.name for item in then}
    trainer = seven().trainer_peaks()
    assert trainer["sync"] > trainer["generate"] + 4 * GIB  # though the whole GPU has its peak after the buckets


def test_without_checkpointing_the_head_comes_on_top_of_all_activations():
    in_head, *_ = seven("model.recompute=none").moments["prm"]
    sizes = {item.name: item.size / GIB for item in in_head}
    assert sizes["prm: activations"] == pytest.approx(104.95, rel=0.01)
    buffers = 2.03 + 2.03 + 0.11 + 0.1  # logits and dlogits, dW, dX, rows scaled
    assert sizes["prm: LM-head buffers"] == pytest.approx(buffers, rel=0.01)
    in_head, *_ = seven("model.recompute=none", "prm.loss=prefix").moments["prm"]
    ahead = 1024 * (152064 * 2 + 3584 * 6) / GIB  # rows of dlogits that the loss of whole responses makes ahead
    (found,) = (item.size / GIB for item in in_head if item.name == "prm: LM-head buffers")
    assert found == pytest.approx(sizes["prm: LM-head buffers"] - ahead, rel=0.001)


def test_what_it_holds_beside_the_gpus():
    plan = seven()
    assert gib(plan, "policy", "asleep", "host") == 0  # the next sync brings the weights
    copies = 8 * 2 * 3 * 4 + 2 * 14.19  # weights and two moments, pinned, of two models; both whole models on rank 0
    assert plan.node_host_bytes("checkpoint", 8) / GIB == pytest.approx(copies, abs=0.1)
    assert plan.node_host_bytes("policy", 8) == plan.node_host_bytes("checkpoint", 8)  # written meanwhile
    last = seven("log.checkpoint_every=0")
    assert last.node_host_bytes("policy", 8) == 0 < last.node_host_bytes("checkpoint", 8)
    assert plan.checkpoint_bytes == pytest.approx(213e9, rel=0.005)
    assert plan.kept_bytes == pytest.approx(852e9, rel=0.005)  # two, the best, and one being written
    assert seven("log.keep=5", "log.eval_every=0").kept_bytes == 6 * plan.checkpoint_bytes


def test_a_sleep_that_keeps_the_weights_pins_twice_their_size():
    plan = seven("rollout.vllm.sleep_level=1")
    assert gib(plan, "policy", "asleep", "host") == pytest.approx(26.75, abs=0.05)  # of 14.2 GiB of weights
    assert plan.node_host_bytes("policy", 8) / GIB == pytest.approx(214 + 220.4, abs=0.5)
    awake = seven("rollout.vllm.sleep_level=0")
    assert gib(awake, "policy", "KV cache") == gib(plan, "generate", "KV cache") > 30


def test_the_embedded_engine_holds_its_cache_and_sleeps_on_the_host():
    plan = seven("rollout.engine=hf", "rollout.batch=32")
    assert gib(plan, "generate", "KV cache") == pytest.approx(32 * 4096 * 28 * 2 * 4 * 128 * 2 / GIB)
    assert gib(plan, "generate", "keys and values again") > 1  # repeated from 4 to 28 heads
    assert gib(plan, "policy", "whole model, asleep", "host") == pytest.approx(14.19, rel=0.01)
    assert gib(plan, "sync", "whole model") == pytest.approx(14.19, rel=0.01)
    assert "weight-sync buckets" not in " ".join(item.name for item in plan.phases["sync"])


def test_engines_apart_leave_the_trainers_gpu_alone():
    plan = seven("rollout.vllm={gpus: [6, 7]}")
    assert total(plan.phases["generate"], "GPU", "engine") == 0
    assert total(plan.phases["generate"], "engine's GPU") == int(0.9 * A100)
    assert plan.peaks["generate"] < seven().peaks["generate"] - 30 * GIB


def test_an_adapter_saves_a_model_and_what_trains_one():
    """Rank 32 on all linear layers of a 7B model: 81 M parameters train."""
    whole, adapted = seven(), seven("prm.lora={}")
    assert adapted.states["prm"].training.count == 80_740_352 and list(adapted.phases) == list(whole.phases)
    rest, full = (gibs(plan.states["prm"].rest()) for plan in (adapted, whole))
    assert rest["parameters"] - full["parameters"] == pytest.approx(2 * 80_740_352 / 8 / GIB)
    states = ("float32 weights", "AdamW moments", "gradients")
    assert [rest[name] for name in states] == pytest.approx([0.0376, 0.0752, 0.0376], rel=0.01)
    saved = whole.peaks["policy"] - adapted.peaks["policy"]
    assert rest["reduce bucket"] == pytest.approx(2 * 80_740_352 / GIB)
    spared = sum(full[name] - rest[name] for name in ("parameters", "reduce bucket", *states))
    assert saved / GIB == pytest.approx(full["parameters"] + spared) and saved > 16 * GIB  # of the reference, the PRM
    head = 152064 * 3584 / GIB
    before, after = (
        gibs(moment for moments in plan.moments["prm"][:2] for moment in moments) for plan in (whole, adapted)
    )
    assert before["LM-head buffers"] - after["LM-head buffers"] == pytest.approx(4 * head)
    assert before["LM-head gradients"] - after["LM-head gradients"] == pytest.approx(2 * 2 * head)
    both = seven("prm.lora={}", "policy.lora={}")
    assert set(both.states) == {"policy", "prm"} and both.checkpoint_bytes < 0.2 * whole.checkpoint_bytes
    assert set(seven("policy.lora={}").states) == {"policy", "prm"}


def test_a_stage_that_trains_an_adapter_keeps_more_of_its_layers():
    config = shipped("eurus2-7b-8xa100", "prm.lora={}", "model.recompute=auto")
    whole, adapted = (Plan(alone(config, lora), 8, A100 // 2) for lora in (None, config.prm.lora))
    assert list(adapted.states) == ["policy"] and adapted.peaks["policy"] < whole.limit
    assert adapted.recompute["policy"].layers < whole.recompute["policy"].layers


def gibs(items):
    return {item.name.removeprefix("prm: "): item.size / GIB for item in items}


def test_phases_are_those_that_run():
    assert list(seven().phases) == [
        *("load", "resume", "generate", "reference", "prm", "prm step"),
        *("old_logprobs", "policy", "policy step", "sync", "checkpoint"),
    ]
    alone = seven("prime.process_weight=0", "rollout.old_logprobs=engine").phases
    assert list(alone) == ["load", "resume", "generate", "policy", "policy step", "sync", "checkpoint"]
    scored = seven("prime.update=none", "model.prm=" + seven().config.model.policy)
    assert "prm" in scored.phases and "prm step" not in scored.phases
    assert scored.checkpoint_bytes * 2 == seven().checkpoint_bytes
    assert "reference" in seven("prime.reference=policy", "rollout.old_logprobs=recompute").phases


def test_without_a_card_vllm_takes_what_its_batch_needs():
    plan = seven(card=None)
    assert plan.rollout.sequences is None
    assert gib(plan, "generate", "KV cache") > 256 * 4096 * 57344 / GIB


def test_a_lone_rank_gathers_nothing_unless_it_offloads():
    assert gib(seven(ranks=1), "policy", "gathered parameters") == gib(seven(ranks=1), "sync", "for export") == 0
    assert gib(seven("engine.offload=cpu", ranks=1), "policy", "gathered parameters") == pytest.approx(1.86, rel=0.01)


def test_ranks_that_share_packs_hold_longer_rows_in_the_same_memory():
    row = ("data.max_prompt=1024", "rollout.max_response=64512")
    with pytest.raises(ValueError, match="16384 cannot hold one row .* 65536 tokens"):
        seven(*row, "engine.micro_tokens=16384")
    short, long = seven("engine.micro_tokens=16384"), seven(*row, "engine.micro_tokens=16384", SHARED)
    for phase, peak in short.trainer_peaks().items():
        assert long.trainer_peaks()[phase] == peak or phase in ("load", "generate", "sync")
    assert mend(seven(*row, "engine.micro_tokens=131072", SHARED))["engine.micro_tokens"] < 65536


def test_powers_of_two():
    assert [pinned(size) for size in (0, 1, 4096, 4097, 1 << 30)] == [0, 1, 4096, 8192, 1 << 30]


def drawn(rng):
    """A configuration that nobody thought of."""
    longest = rng.choice([2048, 4096, 8192])
    overrides = [
        f"data.max_prompt={longest // 4}",
        f"rollout.max_response={longest - longest // 4}",
        f"engine.micro_tokens={longest * rng.randint(1, 8)}",
        f"engine.offload={rng.choice(['none', 'none', 'cpu'])}",
        f"model.recompute={rng.choice(['none', 'all', 'attention-saved', '7'])}",
        f"rollout.batch={rng.choice([16, 64, 256])}",
        f"prime.process_weight={rng.choice([0, 1])}",
        f"rollout.vllm={{gpu_memory_utilization: {rng.choice([0.1, 0.3, 0.5, 0.8])}}}",
        f"rollout.engine={rng.choice(['hf', 'vllm'])}",
    ]
    return shipped(rng.choice(list(SHIPPED)), *overrides)


@pytest.mark.parametrize("seed", range(6))
def test_plans_grow_with_what_they_hold(seed):
    rng = random.Random(seed)
    config, ranks, card = drawn(rng), rng.choice([2, 4, 8, 16]), rng.choice(list(CARDS.values())) * GIB
    plan = Plan(config, ranks, int(card))

    def grows(changed, phases=plan.phases):
        assert all(changed.peaks[phase] >= plan.peaks[phase] for phase in phases)

    grows(Plan(apply(config, {"engine.micro_tokens": 2 * config.engine.micro_tokens}), ranks, int(card)))
    grows(Plan(apply(config, {"rollout.batch": 2 * config.rollout.batch}), ranks, int(card)))
    grows(Plan(apply(config, {"model.recompute": "none"}), ranks, int(card)))
    grows(Plan(apply(config, {"engine.offload": "none"}), ranks, int(card)))
    grows(Plan(apply(config, {"rollout.vllm.gpu_memory_utilization": 0.9}), ranks, int(card)))
    grows(Plan(config, ranks, int(card * 1.5)))  # vLLM takes a share of the card
    # half the ranks hold twice the states each; the self-check at load is one pack of the rows of every engine
    grows(Plan(config, ranks // 2 if ranks > 2 else ranks, int(card)), set(plan.phases) - {"load"})
    for items in plan.phases.values():
        assert all(item.size >= 0 for item in items) and len({item.name for item in items}) == len(items)


@pytest.mark.parametrize("seed", range(12))
def test_the_advice_is_right_and_mild(seed):
    """Applying it makes the run fit, every setting of it is needed, and none could have moved one step less."""
    rng = random.Random(100 + seed)
    config, ranks, card = drawn(rng), rng.choice([1, 2, 4, 8]), int(rng.choice(list(CARDS.values())) * GIB)
    while Plan(config, ranks, card).fits:
        card = int(0.9 * card)
    change = mend(Plan(config, ranks, card))
    if change is None:
        everything = {key: values[-1] for key, values in _settings(Plan(config, ranks, card)).items()}
        assert not Plan(apply(config, everything), ranks, card).fits
        return

    def fits(changed):
        return Plan(apply(config, changed), ranks, card).fits

    assert fits(change)
    now = {"engine.micro_tokens": config.engine.micro_tokens, "rollout.batch": config.rollout.batch}
    now[UTILIZATION] = config.rollout.vllm["gpu_memory_utilization"]
    for key, value in change.items():
        assert not fits({other: given for other, given in change.items() if other != key}), f"{key} was not needed"
        if key in now and value < now[key]:
            less = value * 2 if key == "rollout.batch" else value + {UTILIZATION: 0.05}.get(key, 1024)
            assert less >= now[key] or not fits(change | {key: less}), f"{key} went too far"


def chosen(*overrides, ranks=8, card=A100):
    """With nothing chosen by hand."""
    return Plan(shipped("eurus2-7b-8xa100", *overrides), ranks, card)


@pytest.mark.parametrize("seed", range(8))
def test_as_few_layers_are_recomputed_as_fit(seed):
    rng = random.Random(200 + seed)
    config = apply(drawn(rng), {"model.recompute": "auto"})
    ranks, card = rng.choice([1, 2, 4, 8]), int(rng.choice(list(CARDS.values())) * GIB)
    plan = Plan(config, ranks, card)
    for role, found in plan.recompute.items():
        assert plan.model(role).recompute == found.setting and not found.attention
        same, fewer = (
            Plan(apply(config, {"model.recompute": layers}), ranks, card)
            for layers in (found.layers, max(0, found.layers - 1))
        )
        assert same.peaks[role] == plan.peaks[role]
        assert found.layers == found.of or same.peaks[role] <= 0.95 * card
        assert found.layers == 0 or fewer.peaks[role] > 0.95 * card


def test_what_auto_is_without_a_gpu_or_a_card():
    nothing = {"policy": (0, 28, False), "prm": (0, 28, False)}
    assert chosen(card=None).recompute == nothing
    assert chosen(card=None).chosen() == [
        "model.recompute=auto recomputes layers: 0 of 28 (policy), 0 of 28 (prm), as long as the card is not known."
    ]
    plan = Plan(shipped("eurus2-7b-8xa100"), 8, None, on_gpu=False)
    assert plan.recompute == nothing and not plan.chosen() and not plan.parks and plan.engine_config is plan.config


def test_more_layers_than_the_model_has():
    with pytest.raises(ValueError, match="model.recompute=29 is more than the 28 layers of .*qwen2.5-math-7b; give no"):
        seven("model.recompute=29")


@pytest.mark.parametrize("park", ["true", "false"])
@pytest.mark.parametrize(("name", "card"), [*product(SHIPPED, ["a100-80", "h200"])])
def test_the_engine_gets_what_is_left(name, card, park):
    """Of the card while it is awake, but for a margin; 1% more would be too much."""
    config, ranks, card = shipped(name, f"engine.park={park}"), SHIPPED[name][1], card_bytes(card)
    plan = Plan(config, ranks, card)
    given = plan.engine_config.rollout.vllm["gpu_memory_utilization"]
    assert plan.fits and given == plan.rollout.utilization > (0.75 if park == "true" else 0.1)
    assert f"rollout.vllm.gpu_memory_utilization is {given:g}, by the memory plan." in plan.chosen()
    awake = ("load", "generate", "sync", "checkpoint")
    assert max(plan.peaks[phase] for phase in awake) <= 0.95 * card
    more = Plan(apply(config, {UTILIZATION: given + 0.01}), ranks, card)
    assert given == 0.9 or max(more.peaks[phase] for phase in awake) > 0.95 * card


def test_parked_states_lie_on_the_host_and_the_cache_in_their_place():
    parked, beside = chosen(), chosen("engine.park=false")
    assert parked.rollout.sequences > 1.8 * beside.rollout.sequences
    for name in ("float32 weights", "AdamW moments", "gradients", "reduce bucket"):
        for phase in ("generate", "sync", "checkpoint"):
            assert gib(parked, phase, name) == 0 < gib(beside, phase, name)
        assert gib(parked, "policy", name) == gib(beside, "policy", name)
    for phase in parked.phases:
        assert gib(parked, phase, "buffers to park in", "host") == 24  # of 21.3: a sub-group's 3.55 are pinned as 4
    given = chosen(f"{UTILIZATION}=0.45")
    assert not given.parks and given.fits  # it has room beside them
    assert (tight := chosen(f"{UTILIZATION}=0.6")).parks and tight.fits
    for reason in ("rollout.engine=hf", "rollout.vllm={gpus: [7]}", "rollout.vllm={sleep_level: 0}"):
        assert not chosen(reason).parks
    assert not chosen("engine.offload=cpu").parks


def test_who_gives_the_engine_its_share_keeps_it():
    assert chosen(f"{UTILIZATION}=0.3").engine_config.rollout.vllm == {"gpu_memory_utilization": 0.3}
    assert chosen("rollout.vllm={kv_cache_memory_bytes: 9000000000}").engine_config.rollout.vllm.keys() == {
        "kv_cache_memory_bytes"
    }
    assert chosen("rollout.vllm={gpus: [7]}").rollout.utilization == 0.9
    awake = chosen("rollout.vllm={sleep_level: 0}")  # it would leave nothing to train in
    assert awake.rollout.utilization == 0.5 and "gpu_memory_utilization" not in awake.engine_config.rollout.vllm


def test_some_advice():
    """One example of each kind."""
    roomy = card_bytes("a100-80")
    assert set(mend(seven(f"{UTILIZATION}=0.6"))) == {UTILIZATION}
    assert set(mend(seven(f"{UTILIZATION}=0.15"))) == {UTILIZATION}  # vLLM would not start: it goes up
    assert set(mend(seven("engine.micro_tokens=131072"))) == {"engine.micro_tokens"}
    assert set(mend(seven("rollout.engine=hf"))) == {"rollout.batch"}
    assert set(mend(seven(card=card_bytes("a100-40")))) == {"engine.offload"}
    activations = ("model.recompute=none", "data.max_prompt=16384", "rollout.max_response=16384")
    assert set(mend(seven(*activations, "engine.micro_tokens=32768"))) == {"model.recompute"}
    assert mend(seven(card=roomy // 8)) is None


@pytest.mark.parametrize("text", ["v100", "0", "-80", "nan", "inf", "", "80GB"])
def test_a_card_that_is_none(text):
    with pytest.raises(ValueError, match="is not a card known here; give one of a100-40"):
        card_bytes(text)


def test_cards():
    assert card_bytes("H200") > card_bytes("h100") > card_bytes("a100-40") > 0
    assert card_bytes("48") == 48 * GIB and card_bytes("23.5") == int(23.5 * GIB)
