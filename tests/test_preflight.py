import json
import shutil

import pytest
import torch
from test_learner import models_of
from test_trainer import make_trainer

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


def test_the_self_check_catches_a_model_whose_rows_leak(configure, device, monkeypatch):
    from prime_fast.engine import model

    config = configure()
    trainer = make_trainer(config, device)
    arguments = (*models_of(trainer), trainer.rollout, trainer.inputs, config)
    preflight.self_check(*arguments)

    def leaking(q, k, v, scaling, dropout, window, layout):
        output = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=scaling
        )
        return output[0].transpose(0, 1)

    monkeypatch.setattr(model, "_by_length", leaking)
    with pytest.raises(ValueError, match="packed rows and the same rows one at a time disagree"):
        preflight.self_check(*arguments)
    trainer.close()


def test_the_self_check_catches_a_stale_rollout_engine(configure, device):
    config = configure()
    trainer = make_trainer(config, device)
    with torch.no_grad():
        head = trainer.rollout.engine.model.lm_head.weight
        head.add_(0.1 * torch.randn_like(head))
    with pytest.raises(ValueError, match="rollout engine and the trainer disagree"):
        preflight.self_check(*models_of(trainer), trainer.rollout, trainer.inputs, config)
    trainer.close()
