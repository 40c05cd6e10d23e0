"""Labels of steps, given by characters, meet the log-ratios of tokens."""

import pytest
import torch

from prime_fast import step_labels
from prime_fast.engine.batch import Batch, Group, Sample

TEXTS = ["so 12 + 30 = 42, and 42 + 8 = 50", "Ω = 3 → 4 ÷ 2 = 2", "one"]  # of conftest's tokenizer


def test_every_character_is_found_in_a_token_that_holds_it(byte_tokenizer):
    tokenizer = byte_tokenizer
    for text in TEXTS:
        ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        lengths = [len(tokenizer.decode(ids[: i + 1], skip_special_tokens=True)) for i in range(len(ids))]
        assert len(set(lengths)) < len(lengths) < len(text) + 5
        for character in range(len(text)):
            found = step_labels.token_at(character, ids, tokenizer)
            assert lengths[found] > character and (found == 0 or lengths[found - 1] <= character)


def test_labels_of_right_and_wrong_steps_are_compared(byte_tokenizer):
    tokenizer = byte_tokenizer
    responses = [torch.tensor(tokenizer(text)["input_ids"]) for text in ("= 42, = 50", "= 50, = 42")]
    samples = tuple(Sample(tokens, torch.zeros(len(tokens)), False) for tokens in responses)
    batch = Batch.of([Group(0, 0, tuple(tokenizer("so 12")["input_ids"]), samples, (1.0, 0.0))])

    def labels(prompt, response):
        assert prompt == "so 12"
        return [(response.index("42") + 1, True), (response.index("50") + 1, False)]

    ratio = torch.zeros(int(batch.cu_seqlens[-1]))
    for tokens, start in zip(responses, batch.cu_seqlens.tolist(), strict=False):
        text = tokenizer.decode(tokens)
        ratio[start + step_labels.token_at(text.index("42") + 1, tokens, tokenizer)] = 0.5
    assert step_labels.step_auc(labels, tokenizer, batch, ratio) == 1.0
    assert step_labels.step_auc(labels, tokenizer, batch, -ratio) == 0.0
    assert step_labels.step_auc(lambda *texts: [(0, True)], tokenizer, batch, ratio) is None


def test_a_function_that_is_not_there_is_named():
    with pytest.raises(ValueError, match='prime.step_labels "prime_fast.prime:nothing": there is no function'):
        step_labels.load("prime_fast.prime:nothing")
