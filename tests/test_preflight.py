import json
import shutil

import pytest
from test_trainer import models_of

from prime_fast import preflight
from prime_fast.trainer import Trainer


def test_the_self_check_keeps_to_micro_tokens(configure, device, monkeypatch):
    config = configure("engine.micro_tokens=40")
    trainer = Trainer(config, device, preflight.load_inputs(config))
    engines, sizes = models_of(trainer), []
    for engine in engines:
        run = engine.run
        monkeypatch.setattr(engine, "run", lambda pack, op, run=run: sizes.append(pack) or run(pack, op))
    preflight.self_check(*engines, trainer.rollout, trainer.inputs, config)
    trainer.close()
    tokens = [len(pack.input_ids) for pack in sizes]
    assert max(tokens) <= 40 < sum(tokens[:2]) and max(len(pack.rows) for pack in sizes) > 1


@pytest.mark.parametrize("room", ["max_position_embeddings", "original_max_position_embeddings"])
def test_a_model_without_room_for_a_row_is_refused(room, configure, workspace, tmp_path):
    """RoPE of type longrope has less: beyond its original length a row would change with what it is packed with."""
    model = tmp_path / "model"
    shutil.copytree(workspace / "model", model)
    settings = json.loads((model / "config.json").read_text())
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 27}
    rope |= {"long_factor": [4.0] * 16, "short_factor": [1.0] * 16}
    change = {"max_position_embeddings": 27} if room.startswith("max") else {"rope_parameters": rope}
    (model / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match="rollout.max_response = 28 tokens, but .* has room for 27; lower one of them"):
        preflight.load_inputs(configure(f"model.policy={model}"))
