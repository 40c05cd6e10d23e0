"""The plan in seconds against what others have measured, and against itself where a setting changes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prime_fast.config import load_config
from prime_fast.engine import packing
from prime_fast.memory.advice import apply, card_bytes
from prime_fast.memory.plan import Plan
from prime_fast.memory.shapes import Shape, shape
from prime_fast.speed import rates as tables
from prime_fast.speed import rollouts
from prime_fast.speed.plan import SYNC, Seconds, advice
from prime_fast.speed.rates import CARDS, TABLE, measured, rates
from prime_fast.speed.step import Machine, Rows

ROOT = Path(__file__).parents[2]
SEVEN, SMALL = (str(ROOT / "configs/shapes" / name) for name in ("qwen2.5-math-7b", "qwen2.5-1.5b"))
FOUNDRY = {8192: 3206, 16384: 2453, 32768: 1672, 65536: 1013}  # tokens/s/GPU, 7B, 8 A100-80, full checkpointing
MPT = Shape((("all", 6_649_286_656),), 32, 4096, 32, 32, 128, 16384, 50432, True)  # llm-foundry's 7B
PUBLISHED = {"rollout": 282, "policy": 157, "PRM": 151, "other": 91}  # arXiv 2502.01456, 8 A800: 680 s
# longest row: its mean, seconds of training; an estimate made apart from this one, 9.75 forward units on 8 A100
TRAINING = {4096: (1700, 169), 16384: (5800, 672), 32768: (10400, 1546), 65536: (18500, 3722)}


def configured(name="eurus2-7b-8xa100", model=SEVEN, *overrides):
    return load_config(ROOT / "configs" / f"{name}.yaml", [f"model.policy={model}", *overrides])


def seconds(*overrides, card="a100-80", ranks=8, response=None, **changed):
    given = ("model.recompute=all", "engine.park=false", "rollout.vllm={gpu_memory_utilization: 0.45}")
    plan = Plan(configured("eurus2-7b-8xa100", SEVEN, *given, *overrides), ranks, card_bytes(card))
    return Seconds(plan, replace(rates(card), **changed), response)


@pytest.mark.parametrize("length", FOUNDRY)
def test_tokens_per_second_of_llm_foundry(length):
    machine = Machine(MPT, rates("a100-80"), 8, fused_layers=True)
    rows = Rows.of(0, (float(length),), 64)
    packs = rows.tokens / 8 / max(length, 16384)
    spent = machine.pass_seconds(rows, 4.0, packs, trains=True) + machine.optimizer_step()
    assert rows.tokens / 8 / spent == pytest.approx(FOUNDRY[length], rel=0.25)


def test_the_published_step():
    """The dataflow of the published run, not ours: 8 forward units without checkpointing, old log-probs of every
    generated row, one row a micro-batch, parameters and optimizers on the host, rounds of rollouts without graphs."""
    made = replace(rates("a100-80"), link=200e9)  # an A800
    machine = Machine(shape(SEVEN), made, 8, offload=True)
    prompt, response, rows, rounds = 195, 1435, 1024, 2  # about half of the groups pass
    drawn = rollouts.lengths(rows, response, 3072)
    kept, started = Rows.of(prompt, drawn, rows), Rows.of(prompt, drawn, rounds * rows)

    def run(over, units, trains=False):
        return machine.pass_seconds(over, units, over.count / 8, trains)

    policy = run(kept, 3, trains=True) + 4 * machine.optimizer_step()
    prm = run(kept, 3, trains=True) + run(kept, 1) + 4 * machine.optimizer_step()
    weights = 2 * machine.shape.count

    def token(sequences, tokens):
        moved = weights + tokens * machine.shape.kv_bytes(2)
        return made.token_eager + moved / (made.memory * made.decode)

    rollout = rounds * rollouts.decode(rollouts.lengths(rows // 8, response, 3072), 128, prompt, token)
    other = run(started, 1) + weights / made.sync
    assert rollout + policy + prm + other == pytest.approx(sum(PUBLISHED.values()), rel=0.25)
    assert rollout == pytest.approx(PUBLISHED["rollout"], rel=0.25)


@pytest.mark.parametrize("longest", TRAINING)
def test_our_own_training_by_length(longest):
    row, training = TRAINING[longest]
    settings = [f"rollout.max_response={longest - 1024}", f"engine.micro_tokens={max(longest, 16384)}"]
    found = seconds(*settings, response=row - 205)
    trained = sum(found.phases[name] for name in ("reference", "prm", "old_logprobs", "policy"))
    assert trained == pytest.approx(training, rel=0.25)


def test_work_is_what_packing_balances():
    """One row's FLOPs grow with its length as packing.work says, for the model's own share of attention."""
    machine = Machine(shape(SEVEN), rates("h100"), 1)
    share = 28 * 128 * 28 / machine.products

    def flops(length):
        found = machine.forward_flops(Rows(1, length, length**2, 0))
        return found["layers"] + found["attention"]

    assert flops(60000) / flops(100) == pytest.approx(packing.work(60000, share) / packing.work(100, share))
    assert flops(1) == pytest.approx(2 * (7_615_616_512 - 2 * 152064 * 3584), rel=1e-4)


def test_lengths_have_the_mean_and_the_end_they_are_given():
    for count, mean, longest in [(1024, 1435, 3072), (7, 20, 40), (1, 5, 9), (64, 40, 40), (4096, 400, 65536)]:
        drawn = rollouts.lengths(count, mean, longest)
        assert len(drawn) == count and max(drawn) <= longest
        assert sum(drawn) / count == pytest.approx(mean, rel=1e-3)


def test_decoding_fills_free_slots_and_counts_what_is_held():
    """Three sequences of 4, 1 and 2 tokens on two slots: the third takes the second one's place."""
    seen = []

    def token(sequences, tokens):
        seen.append((sequences, tokens))
        return 1.0

    assert rollouts.decode((4, 1, 2), 2, 10, token) == 4
    # (step, held): until 1 two of on average half a token, until 3 one of 2 and one of 1, until 4 one of 3.5
    assert seen == [(2, 21.0), (2, 23.0), (1, 13.5)]
    assert rollouts.in_batches((4, 1, 2), 2, 10, token) == 6


@pytest.mark.parametrize(
    ("change", "phase"),
    [
        ({"model.recompute": "none"}, "policy"),
        ({"model.recompute": "attention-saved"}, "policy"),
        ({"model.recompute": 20}, "prm"),
        ({"rollout.vllm.gpu_memory_utilization": 0.8}, "generate"),
        ({"rollout.samples": 2}, "prm"),
        ({"prm.lora": {}}, "prm"),
        ({"rollout.keep": [0, 1]}, "generate"),
        ({"rollout.old_logprobs": "engine"}, "old_logprobs"),
        ({"prime.process_weight": 0.0}, "prm"),
        ({"engine.micro_tokens": 65536}, "reference"),
    ],
)
def test_what_saves_time_does(change, phase):
    before = seconds("rollout.max_response=15360")
    after = Seconds(Plan(apply(before.config, change), 8, before.plan.card), before.rates, before.response)
    assert after.phases.get(phase, 0.0) < before.phases[phase] and after.total < before.total


def test_modes_of_recomputation_are_counted_in_flops():
    """Half of the layers cost half a forward; what attention-saved spares is the attention of that forward."""
    found = {mode: seconds(f"model.recompute={mode}", card="h200") for mode in ("none", 14, "attention-saved", "all")}
    times = {mode: step.phases["policy"] for mode, step in found.items()}
    assert times[14] - times["none"] == pytest.approx((times["all"] - times["none"]) / 2)
    some = found["all"]
    attention = some.machine("policy").forward_flops(some.rows)["attention"]
    spared = attention / some.rates.attention / some.rates.peak / 8 / some.rates.balance
    assert times["all"] - times["attention-saved"] == pytest.approx(spared)


def test_an_adapter_spares_the_gradients_of_the_weights():
    """A third of the products of a forward and backward, of the layers and of the LM head; no part of the attention."""
    whole, adapted = (seconds("model.recompute=none", *more, card="h200") for more in ([], ["prm.lora={}"]))
    rows, machine = whole.rows, whole.machine("prm")
    flops, some = machine.forward_flops(rows), whole.rates
    spared = flops["layers"] / (some.layers * some.hf_layers) + flops["head"] / some.head
    spared /= machine.flops * 8 * some.balance
    left = adapted.machine("prm").optimizer_step() / machine.optimizer_step()
    steps = 4 * (1 - left) * machine.optimizer_step()
    assert whole.phases["prm"] - adapted.phases["prm"] - steps == pytest.approx(spared, rel=0.1)
    assert left < 0.02 and whole.phases["policy"] == adapted.phases["policy"]


def chosen(*overrides):
    plan = Plan(
        configured("eurus2-7b-8xa100", SEVEN, "rollout.max_response=15360", *overrides), 8, card_bytes("a100-80")
    )
    return Seconds(plan, rates("a100-80"))


def test_parking_buys_cache_for_a_transfer():
    parked, beside = chosen(), chosen("engine.park=false")
    moved = 2 * 2 * 12 * parked.plan.states["policy"].partition  # there and back, policy and PRM
    assert parked.phases["sync and other"] - beside.phases["sync and other"] == pytest.approx(moved / 25e9)
    assert parked.slots > beside.slots and parked.phases["generate"] < 0.9 * beside.phases["generate"]


@pytest.mark.parametrize(
    ("changed", "advised"),
    [
        ({"model.recompute": "all"}, {"model.recompute"}),
        ({"engine.park": "false"}, {"engine.park"}),
        ({"engine.park": "false", "model.recompute": "all"}, {"engine.park"}),
        ({"rollout.max_response": 31744, "engine.micro_tokens": 32768}, {"model.recompute"}),  # attention-saved
    ],
)
def test_advice_names_what_memory_can_buy(changed, advised):
    found = chosen(*(f"{key}={value}" for key, value in changed.items()))
    change, saved = advice(found)
    assert change.keys() & {"model.recompute", "engine.park"} == advised, change


@pytest.mark.parametrize("changed", [{"rollout.vllm.enforce_eager": True}, {"engine.offload": "cpu"}])
def test_what_costs_time_is_advised_against(changed):
    found = seconds(*(f"{key}={str(value).lower()}" for key, value in changed.items()), card="h200")
    assert found.total > seconds(card="h200").total
    change, saved = advice(found)
    mended = Plan(apply(found.config, change), 8, found.plan.card)
    assert mended.fits
    assert Seconds(mended, found.rates, found.response).total == pytest.approx(found.total - saved)
    if "rollout.vllm.enforce_eager" in changed:
        assert change == {"rollout.vllm.enforce_eager": False}


def test_sharing_packs_costs_what_attention_sends():
    """Qwen2.5-7B at 16k on 8 A100: 28 layers x 2 (28 + 4) heads of 128 bfloat16 values a token leave their rank."""
    alone = seconds("rollout.max_response=15360")
    shared = Seconds(Plan(apply(alone.config, {"engine.sequence_parallel": 4}), 8, alone.plan.card), alone.rates)
    sent = alone.rows.tokens / 8 / alone.rates.balance * 28 * 2 * (28 + 4) * 128 * 2 * 3 / 4
    spent = sent / (alone.rates.link * alone.rates.collective)
    assert shared.phases["reference"] - alone.phases["reference"] == pytest.approx(spent)
    assert shared.phases["policy"] - alone.phases["policy"] == pytest.approx(3 * spent)  # forward, again, backward
    assert shared.total < 1.05 * alone.total


def test_each_card_has_every_rate_with_its_source():
    for card in CARDS:
        assert all(value > 0 for value in vars(rates(card)).values())
    assert all(row.source and row.what for row in TABLE.values())
    assert TABLE.keys() == vars(rates("h200")).keys()


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", ["eurus2-7b-8xa100", "qwen2.5-1.5b-1xa100", "quickstart", "smollm2-gsm8k"])
def test_every_config_has_seconds(name, card):
    for engine in ("hf", "vllm"):
        config = configured(name, SMALL, f"rollout.engine={engine}")
        found = Seconds(Plan(config, 1, card_bytes(card)), rates(card))
        assert min(found.phases.values()) > 0 and found.tokens_per_second > 0
        advice(found)


def gpu_results(folder, made):
    """What `make gpu` leaves, of a card on which trainer steps of 16 and 4 rows run at given rates."""
    folder.mkdir(parents=True)
    cases = []
    for length, count in ((4096, 32), (16384, 8)):
        flops = Machine(shape(SMALL), made, 1).forward_flops(Rows(count, count * length, count * length**2, 1e5))
        policy = (
            4 * (flops["layers"] / made.layers + flops["attention"] / made.attention) + 3 * flops["head"] / made.head
        )
        cases.append({"row_tokens": length, "forward_flops": flops, "seconds": {"policy": policy / made.peak}})
    items = {"1.5B PRIME": {"cases": cases}, "0.5B PRIME": {"error": "lost"}}
    (folder / "step.json").write_text(json.dumps({"items": items}))
    (folder / "facts.json").write_text(json.dumps({"items": {"copy": {"gb_per_s": made.memory * 0.5 / 1e9}}}))
    (folder / "engine.json").write_text(json.dumps({"items": {"sync": {"seconds_each": 2.0, "gib": 3.0}}}))


def test_results_of_make_gpu_take_the_place_of_the_table(tmp_path, monkeypatch):
    made = replace(rates("h200"), layers=0.41, attention=0.17)
    gpu_results(tmp_path / "nvidia-h200", made)
    found, source = measured("h200", str(tmp_path / "nvidia-h200"))
    assert (found.layers, found.attention, found.streaming) == pytest.approx((0.41, 0.17, 0.5))
    assert found.hf_layers == 1 and found.sync == 1.5 * 2**30 and found.token == rates("h200").token
    assert "attention, hf_layers, layers, streaming, sync from" in source
    monkeypatch.setattr(tables, "RESULTS", tmp_path)  # found without being named, for this card alone
    assert measured("h200", None)[0] == found
    assert measured("h100", None)[0] == rates("h100")
    (tmp_path / "nvidia-a100-sxm4-80gb").mkdir()
    (tmp_path / "nvidia-a100-sxm4-80gb" / "step.json").write_text("{}")
    assert tables._results("a100-80").name == "nvidia-a100-sxm4-80gb" and tables._results("a100-40") is None


def test_a_json_of_rates_does_too(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text('{"layers": 0.3}')
    assert measured("h100", str(path))[0] == replace(rates("h100"), layers=0.3)
    for text, said in [
        ("[]", "must be a JSON object"),
        ("{", "is no JSON"),
        ('{"layer": -1}', "layer is -1"),
        ('{"mfu": 0.4}', "unknown rate mfu"),
        ("{}", "holds no rate"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            measured("h100", str(path))
    with pytest.raises(ValueError, match="does not exist"):
        measured("h100", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="holds no rate"):
        (tmp_path / "empty").mkdir()
        measured("h100", str(tmp_path / "empty"))


def test_what_the_prm_trains_on_besides_takes_its_time():
    one, three, every = seconds(), seconds("prm.passes=3"), seconds("prm.rows=all")
    assert three.phases["prm"] == pytest.approx(3 * one.phases["prm"])
    assert {**three.phases, "prm": 0} == {**one.phases, "prm": 0}
    for phase in ("reference", "prm"):
        assert every.phases[phase] == pytest.approx(2 * one.phases[phase], rel=0.02)  # half of the groups pass
    assert every.phases["policy"] == one.phases["policy"]
    apart = "rollout.vllm={gpus: [8]}", "rollout.batch=1024"  # one engine, so that all of it hides behind the rollouts
    early = [seconds(*apart, *more).beside for more in ((), ("prm.passes=3",), ("prm.rows=all",))]
    assert early == pytest.approx([early[0]] * 3, rel=0.02) and early[0] > 0


def test_what_runs_beside_the_rollouts_of_engines_of_their_own_is_not_added():
    def apart(*overrides):
        return seconds("rollout.vllm={gpus: [8, 9, 10, 11]}", *overrides)

    shared, off, on, ahead = seconds(), apart("prime.overlap=false"), apart(), apart("rollout.ahead=1")
    assert shared.beside == off.beside == 0 and off.total == sum(off.phases.values())
    assert on.phases == off.phases == ahead.phases
    assert on.beside == min(on.phases["generate"], on.phases["reference"] + on.phases["prm"])
    assert ahead.total == pytest.approx(
        max(ahead.phases["generate"], sum(ahead.phases.values()) - ahead.phases["generate"] - ahead.phases[SYNC])
        + ahead.phases[SYNC]
    )
    assert ahead.total <= on.total < off.total
