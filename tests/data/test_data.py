import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

from prime_fast.data.rows import PromptSampler, load_demonstrations, load_rows

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer():
    """Bytes as tokens, and ChatML."""
    symbols = ["<|im_end|>", "<|im_start|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={symbol: i for i, symbol in enumerate(symbols)},
        merges=[],
        unk_token="<|im_end|>",
        pad_token="<|im_end|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def row(text="2+2?", truth="4", **more):
    prompt = [{"role": "user", "content": text}]
    return {"prompt": prompt, "reward_model": {"style": "rule", "ground_truth": truth}} | more


def write_rows(path, rows):
    """Dicts, and lines of jsonl as they are."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def write(tmp_path):
    return lambda rows, name="rows.jsonl": write_rows(tmp_path / name, rows)


class TestRows:
    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
    def test_same_rows_from_every_format(self, write, tokenizer, name):
        given_rows = [row(f"é {i}?", str(i), data_source="d", ability="math", extra_info={"i": i}) for i in range(600)]
        path = write(given_rows, name)
        rows = load_rows(path, tokenizer, max_prompt_tokens=100)
        assert len(rows) == 600 and rows.dropped == 0
        for i in (0, 255, 256, 599):
            ids = tokenizer.apply_chat_template(
                given_rows[i]["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False
            )
            assert rows[i] == given_rows[i] | {"prompt_ids": ids, "_where": f"{path}, row {i + 1}"}
            assert tokenizer.decode(ids) == f"<|im_start|>user\né {i}?<|im_end|>\n<|im_start|>assistant\n"
        with pytest.raises(IndexError):
            rows[600]

    def test_several_files_and_lines_called_json(self, write, tokenizer, tmp_path):
        lines = write([row("c", 3)])
        renamed = lines.rename(tmp_path / "lines.json")
        paths = [write([row("a", 1)], "a.parquet"), str(write([row("b", 2)])), renamed]
        rows = load_rows(paths, tokenizer, max_prompt_tokens=100)
        assert [r["reward_model"]["ground_truth"] for r in rows] == [1, 2, 3]
        assert rows.source == [str(path) for path in paths]

    def test_rows_need_not_be_alike(self, write, tokenizer):
        mixed = [
            row(truth=4, extra_info={"index": 0}),
            row(truth="4", extra_info={"index": "zero", "more": [1, {"a": None}]}, data_source="x"),
            row(truth=0.5, extra_info=None, ability="math"),
            row(truth=0, note="kept"),
            row(truth='{"inputs": []}', extra_info={"index": [1.5]}),
        ]
        rows = load_rows(write(mixed), tokenizer, max_prompt_tokens=100)
        for made, original in zip(rows, mixed, strict=True):
            empty = {"data_source": None, "ability": None, "extra_info": None}
            added = [key for key in made if key not in original and key not in ("prompt_ids", "_added", "_where")]
            assert made == empty | original | {key: made[key] for key in ("prompt_ids", "_where")} | {"_added": added}

    def test_long_prompts_are_dropped_and_counted(self, write, tokenizer):
        path = write([row("x" * 200), row("short"), row("y" * 200), row("brief")])
        rows = load_rows(path, tokenizer, max_prompt_tokens=60)
        assert len(rows) == 2 and rows.dropped == 2
        assert [r["prompt"][0]["content"] for r in rows] == ["short", "brief"]
        assert max(len(r["prompt_ids"]) for r in rows) <= 60

    def test_limit_counts_rows_kept(self, write, tokenizer):
        path = write([row("x" * 200)] + [row(str(i)) for i in range(700)])
        for limit in (1, 256, 300):
            rows = load_rows(path, tokenizer, max_prompt_tokens=60, limit=limit)
            assert len(rows) == limit and rows[limit - 1]["prompt"][0]["content"] == str(limit - 1)

    def test_memory_does_not_grow_with_the_file(self, write, tokenizer):
        path = write([row(f"{i}", "t" * 2000) for i in range(4000)])
        tracemalloc.start()
        rows = load_rows(path, tokenizer, max_prompt_tokens=100)
        assert rows[3999]["reward_model"]["ground_truth"] == "t" * 2000
        assert tracemalloc.get_traced_memory()[1] < 5e6 < path.stat().st_size
        tracemalloc.stop()

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([row(), "\n", row() | {"prompt": None}], r"rows.jsonl, row 3 has no prompt"),
            ([row() | {"prompt": []}], "row 1 has no prompt"),
            ([row() | {"prompt": "2+2?"}], "row 1 has a prompt that is no list of .* messages but str '2"),
            ([row() | {"prompt": [{"role": "user"}]}], "row 1 has a prompt that is no list"),
            ([row(), row() | {"reward_model": {}}], "row 2 has no reward_model.ground_truth"),
            ([row() | {"reward_model": None}], "row 1 has no reward_model.ground_truth"),
            ([row() | {"reward_model": ["4"]}], "row 1 has a reward_model that is no object"),
            ([row(truth="")], "row 1 has no reward_model.ground_truth"),
            ([row(), "{broken\n"], "row 2 is not JSON"),
            (["[1]\n"], "row 1 is not an object but list"),
            ([json.dumps(row("\ud800")) + "\n"], "row 1 has a prompt that is not valid Unicode"),
            ([json.dumps(row()) + "\n", "[" * 100_000 + "\n"], "row 2 is not JSON: maximum recursion depth"),
            ([], "empty dataset: no rows in"),
            ([row("x" * 100), row("x" * 150)], r"all 2 rows .* longer than 60 .*\d+ to \d+\): raise data.max_prompt"),
        ],
    )
    def test_bad_rows(self, write, tokenizer, rows, message):
        with pytest.raises(ValueError, match=message):
            load_rows(write(rows), tokenizer, max_prompt_tokens=60)

    def test_bad_files(self, write, tokenizer, tmp_path):
        with pytest.raises(FileNotFoundError, match="data file .*absent.jsonl does not exist"):
            load_rows(tmp_path / "absent.jsonl", tokenizer, max_prompt_tokens=9)
        with pytest.raises(ValueError, match="must end in .jsonl, .json, .parquet"):
            load_rows(write([], "rows.csv"), tokenizer, max_prompt_tokens=9)
        (tmp_path / "bad.parquet").write_text("no")
        with pytest.raises(ValueError, match="bad.parquet is not a parquet file"):
            load_rows(tmp_path / "bad.parquet", tokenizer, max_prompt_tokens=9)
        good = write([row(str(i)) for i in range(300)], "cut.parquet")
        good.write_bytes(good.read_bytes().replace(b"Snappy", b"Sn4ppy")[:-40] + good.read_bytes()[-30:])
        with pytest.raises(ValueError, match="cut.parquet is not a parquet file, or a damaged one"):
            load_rows(good, tokenizer, max_prompt_tokens=99)
        (tmp_path / "latin.jsonl").write_bytes(json.dumps(row()).encode() + b'\n{"prompt": "\xe9"}\n')
        with pytest.raises(ValueError, match="latin.jsonl, row 2 is not JSON: 'utf-8' codec"):
            load_rows(tmp_path / "latin.jsonl", tokenizer, max_prompt_tokens=99)
        (tmp_path / "bad.json").write_text("[{]")
        with pytest.raises(ValueError, match="bad.json is not JSON"):
            load_rows(tmp_path / "bad.json", tokenizer, max_prompt_tokens=9)

    def test_chat_template(self, write, tokenizer, monkeypatch):
        monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no users here') }}")
        with pytest.raises(ValueError, match="row 1 has a prompt that the chat template refuses: no users here"):
            load_rows(write([row()]), tokenizer, max_prompt_tokens=9)
        monkeypatch.setattr(tokenizer, "chat_template", None)
        with pytest.raises(ValueError, match="has no chat template"):
            load_rows(write([row()]), tokenizer, max_prompt_tokens=9, template="chat")


class TestDemonstrations:
    def responses(self, tokenizer, path, **options):
        rows = load_demonstrations(path, tokenizer, max_tokens=500, **options)
        assert all(r["response_ids"][-1] == tokenizer.eos_token_id for r in rows)
        assert all(tokenizer.decode(r["prompt_ids"]).endswith("<|im_start|>assistant\n") for r in rows)
        return [tokenizer.decode(r["response_ids"][:-1]) for r in rows]

    def test_solution(self, write, tokenizer):
        path = write([row(extra_info={"solution": "It is {4}."}), row(response="It is four.")])
        assert self.responses(tokenizer, path) == ["It is {4}.", "It is four."]

    def test_template(self, write, tokenizer):
        path = write([row(extra_info={"solution": "2+2 = 4.\n#### 4"})])
        template = "{reasoning}\n\\boxed{{{ground_truth}}}"
        assert self.responses(tokenizer, path, response=template) == ["2+2 = 4.\n\\boxed{4}"]
        assert self.responses(tokenizer, path, response="{solution}!") == ["2+2 = 4.\n#### 4!"]

    @pytest.mark.parametrize("model", [None, {"style": "rule"}])
    def test_a_worked_solution_needs_no_truth(self, write, tokenizer, model):
        assert self.responses(tokenizer, write([row(response="4") | {"reward_model": model}])) == ["4"]

    def test_other_key(self, write, tokenizer):
        assert self.responses(tokenizer, write([row(worked={"out": "4"})]), solution="worked.out") == ["4"]

    def test_long_ones_are_dropped(self, write, tokenizer):
        rows = [row(response="x" * 100), row(response="x" * 10)]
        made = load_demonstrations(write(rows), tokenizer, max_tokens=80)
        assert (len(made), made.dropped) == (1, 1)

    @pytest.mark.parametrize(
        ("rows", "options", "message"),
        [
            ([row()], {}, "row 1 has no extra_info.solution"),
            ([row(response=4)], {}, "row 1 has no extra_info.solution"),
            ([row(response="4")], {"response": "{answer}"}, "template '{answer}', which cannot be filled"),
            ([row(response="4")], {"response": "\\boxed{"}, "cannot be filled"),
        ],
    )
    def test_errors(self, write, tokenizer, rows, options, message):
        with pytest.raises(ValueError, match=message):
            load_demonstrations(write(rows), tokenizer, max_tokens=500, **options)


class TestSampler:
    @given(st.integers(1, 50), st.integers(0, 2**32), st.lists(st.integers(0, 60), max_size=8))
    def test_epochs_are_permutations(self, size, seed, takes):
        sampler = PromptSampler(size, seed)
        taken = [index for n in takes for index in sampler.take(n)]
        assert len(taken) == sum(takes) and all(type(index) is int for index in taken)
        for start in range(0, len(taken), size):
            epoch = taken[start : start + size]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(size))

    @given(st.integers(1, 50), st.integers(0, 120), st.integers(0, 120))
    def test_resumes_where_it_was(self, size, before, after):
        sampler = PromptSampler(size, 7)
        sampler.take(before)
        state = json.loads(json.dumps(sampler.state_dict()))
        resumed = PromptSampler(size, 7)
        resumed.load_state_dict(state)
        assert resumed.take(after) == sampler.take(after)
        assert PromptSampler(size, 7).take(before + after)[before:] == resumed_from(size, state, after)

    def test_epochs_and_seeds_differ(self):
        sampler = PromptSampler(100, 0)
        assert sampler.take(100) != sampler.take(100)
        assert PromptSampler(100, 0).take(100) != PromptSampler(100, 1).take(100)

    def test_other_data_is_refused(self):
        with pytest.raises(ValueError, match="made with 5 rows of data, now there are 6"):
            PromptSampler(6, 0).load_state_dict(PromptSampler(5, 0).state_dict())


def resumed_from(size, state, n):
    sampler = PromptSampler(size, 7)
    sampler.load_state_dict(state)
    return sampler.take(n)
