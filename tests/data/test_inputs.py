"""What preflight loads: both files with their counts, by the options of the config."""

import json

import pytest

from prime_fast.preflight import load_inputs


@pytest.fixture
def long(tmp_path):
    prompts = ["1+1:", "1" * 40 + ":", "2+2:", "2" * 40 + ":"]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "2"}) + "\n" for prompt in prompts))
    return path


def test_what_was_dropped_is_said_of_both(configure, long, capsys):
    inputs = load_inputs(configure(f"data.eval={long}"))
    train, held_out = capsys.readouterr().out.splitlines()
    assert train.startswith("train: 40 rows of ") and train.endswith("rows.jsonl (verl shape)")
    left = "2 too long, 2 as they stand, not through a chat template (data.template)"
    assert held_out == f"eval: 2 of 2 rows of {long} (trl shape), {left}"
    assert len(inputs.eval) == 2


def test_options_of_the_config(configure, long):
    assert load_inputs(configure(f"data.train={long}", "data.template=chat")).train.raw == 0
    with pytest.raises(ValueError, match="template_args sets enable_thinking, unknown to the chat template"):
        load_inputs(configure("data.template_args.enable_thinking=false"))
    with pytest.raises(ValueError, match='rows.jsonl, row 1 has ability "test", which reward "auto" cannot score'):
        load_inputs(configure("reward.function=auto"))


def test_stop_tokens_end_responses_beside_eos(configure, workspace):
    plain = load_inputs(configure()).eos_ids
    stopped = load_inputs(configure('rollout.stop=["4", 7]'))
    (four,) = stopped.tokenizer.encode("4", add_special_tokens=False)
    assert stopped.eos_ids == (*plain, four, 7) and four != 7
    assert load_inputs(configure("rollout.stop=7")).eos_ids == (*plain, 7)
    with pytest.raises(ValueError, match="^rollout.stop='44' is 2 tokens of this vocabulary; give a single one"):
        load_inputs(configure('rollout.stop=["44"]'))
    with pytest.raises(ValueError, match="^rollout.stop=99999 is not in the model's vocabulary of "):
        load_inputs(configure("rollout.stop=99999"))
