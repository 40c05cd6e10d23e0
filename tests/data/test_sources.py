import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import byte_tokenizer, row, write_rows

from prime_fast.data import shapes, sources
from prime_fast.data.rows import load_demonstrations, load_rows
from prime_fast.rewards import row_check


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def write(tmp_path):
    return lambda rows, name="rows.jsonl": write_rows(tmp_path / name, rows)


class TestShapes:
    @pytest.mark.parametrize(
        ("shape", "given_row", "truth"),
        [
            ("trl", {"prompt": [{"role": "user", "content": "2+2?"}], "ground_truth": "4", "level": 3}, "4"),
            ("trl", {"prompt": [{"role": "user", "content": "2+2?"}], "answer": 4}, 4),
            ("messages", {"messages": row()["prompt"], "solution": r"It is \boxed{4}."}, r"It is \boxed{4}."),
            ("messages", {"messages": row()["prompt"], "answer": None, "solution": "4"}, "4"),
            ("openrlhf", {"input": "2+2?", "label": "4"}, "4"),
            ("openrlhf", {"input": [{"role": "user", "content": "2+2?"}], "answer": "4"}, "4"),
            ("alpaca", {"instruction": "2+2?", "input": "", "answer": "4"}, "4"),
            ("openrlhf", {"problem": "2+2?", "solution": "2+2 = 4", "answer": "4"}, "4"),
            ("openrlhf", {"question": "2+2?", "answer": "2+2 = 4\n#### 4"}, "4"),
            ("verl", row(), "4"),
        ],
    )
    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
    def test_same_tokens_and_truth(self, write, tokenizer, shape, given_row, truth, name):
        rows = load_rows(write([given_row], name), tokenizer, max_prompt_tokens=100)
        assert rows.shape == [shape] and f"rows{Path(name).suffix} ({shape} shape)" in str(rows)
        assert tokenizer.decode(rows[0]["prompt_ids"]) == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
        assert rows[0]["reward_model"]["ground_truth"] == truth
        assert {key: rows[0][key] for key in given_row if key != "extra_info"} == given_row

    def test_trl_rewards_need_no_truth(self, write, tokenizer):
        rows = load_rows(write([{"prompt": "Be brief.", "words": 7}]), tokenizer, max_prompt_tokens=100)
        assert rows[0]["reward_model"] is None and (rows[0]["prompt"], rows[0]["words"]) == ("Be brief.", 7)
        assert str(rows).endswith("(trl shape), 1 as they stand, not through a chat template (data.template)")

    def test_worked_solutions_become_demonstrations(self, write, tokenizer):
        path = write([{"question": "2+2?", "answer": "2+2 = 4\n#### 4"}])
        rows = load_demonstrations(path, tokenizer, max_tokens=200, response="{reasoning} So {ground_truth}.")
        assert tokenizer.decode(rows[0]["response_ids"][:-1]) == "2+2 = 4 So 4."

    def test_each_file_has_its_own(self, write, tokenizer):
        paths = [
            write([row()]),
            write([{"prompt": "a", "answer": "b"}], "b.jsonl"),
            write([{"input": "a", "label": 1}], "c.json"),
        ]
        assert load_rows(paths, tokenizer, max_prompt_tokens=100).shape == ["verl", "trl", "openrlhf"]
        assert load_rows(paths, tokenizer, max_prompt_tokens=100, limit=1).shape == ["verl", "trl", "openrlhf"]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": ""}], "row 2 has no reward_model.ground_truth"),
            ([{"prompt": "a", "answer": "1"}, {"answer": "1"}], "row 2 has no prompt"),
            ([{"input": "a"}], "row 1 has no reward_model.ground_truth"),
            (
                [{"input": "a", "label": 1}, {"label": 1}],
                "row 2 has no prompt in context_messages, input, question, problem",
            ),
            ([{"input": "a", "question": "b", "label": 1}], "row 1 has two prompts: .*input.*question"),
            ([{"instruction": "a", "question": "b", "answer": 1}], "row 1 has two prompts: .*instruction.*question"),
            ([{"messages": [{"role": "user", "content": "a"}], "problem": "b"}], "row 1 has two prompts: .*problem"),
            ([{"input": 5, "label": 1}], "row 1 has a prompt that is no list"),
            ([{"text": "a"}], "row 1 has no prompt"),
            ([row(), {"prompt": [{"role": "user", "content": "x"}]}], "row 2 has no reward_model.ground_truth"),
        ],
    )
    def test_errors(self, write, tokenizer, rows, message):
        with pytest.raises(ValueError, match=message):
            load_rows(write(rows), tokenizer, max_prompt_tokens=100, check=row_check("auto"))


class TestDrop:
    def test_broken_rows(self, write, tokenizer):
        path = write([{}, row("a"), "{no\n", row(truth=None), {"prompt": 3}, row("b"), "[]\n"])
        rows = load_rows(path, tokenizer, max_prompt_tokens=100, drop=["broken"], check=row_check("auto"))
        assert (len(rows), rows.broken, rows.dropped) == (2, 5, 0)
        assert str(rows).endswith("rows.jsonl (verl shape), 5 broken")
        with pytest.raises(ValueError, match="no rows in .* but 256 broken ones"):
            load_rows(write([{}] * 256), tokenizer, max_prompt_tokens=100, drop=["broken"])

    def test_duplicates(self, write, tokenizer):
        rows = [row(str(i % 300), str(i)) for i in range(900)]
        kept = load_rows([write(rows), write(rows, "b.json")], tokenizer, max_prompt_tokens=100, drop=["duplicates"])
        assert (len(kept), kept.duplicates) == (300, 1500)
        assert [kept[i]["reward_model"]["ground_truth"] for i in range(300)] == [str(i) for i in range(300)]
        answers = [row("a", response="1"), row("a", response="2"), row("a", response="1")]
        assert len(load_demonstrations(write(answers), tokenizer, max_tokens=99, drop=["duplicates"])) == 2

    def test_unknown(self, write, tokenizer):
        with pytest.raises(ValueError, match="broken or duplicates, not as .*'short'"):
            load_rows(write([row()]), tokenizer, max_prompt_tokens=99, drop=["short"])


class TestHub:
    def test_a_dataset(self, tokenizer, tmp_path, monkeypatch):
        """The library takes a directory for a hub name too, which needs no network."""
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        folder = tmp_path / "org" / "name"
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            lines = [json.dumps({"question": f"{split} {i}?", "answer": str(i)}) + "\n" for i in range(600)]
            (folder / f"{split}.jsonl").write_text("".join(lines))
        rows = load_rows("hf://org/name:test[:500]", tokenizer, max_prompt_tokens=100)
        assert len(rows) == 500 and rows.shape == ["openrlhf"]
        assert rows[499]["question"] == "test 499?" and rows[499]["reward_model"]["ground_truth"] == "499"
        assert load_rows("hf://org/name", tokenizer, max_prompt_tokens=100)[0]["question"] == "train 0?"

    @pytest.mark.parametrize("name", ["hf://no-such-org/no-such-name/main:test", "no-such-org/no-such-name"])
    def test_unreachable(self, tokenizer, name, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(
            ValueError, match=f"{name} is no file here, .* give the path of a .jsonl or .parquet file"
        ) as error:
            load_rows(name, tokenizer, max_prompt_tokens=9)
        assert "\n" not in str(error.value)


class TestCache:
    @pytest.fixture
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sources, "CACHE_FROM_BYTES", 0)
        monkeypatch.setenv("PRIME_FAST_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache" / "rows"

    def test_ranks_share_one_file(self, write, tokenizer, cache):
        path = write([row(str(i)) for i in range(2000)] + [{"broken": 1}])

        def load(_):
            return load_rows(path, tokenizer, max_prompt_tokens=100, drop=["broken"])

        with ThreadPoolExecutor(4) as pool:
            first, *others = pool.map(load, range(4))
        for rows in others:
            assert (len(rows), rows.broken, rows.shape) == (2000, 1, ["verl"]) and rows[1999] == first[1999]
        assert sorted(file.suffix for file in cache.iterdir()) == [".arrow", ".lock"]

    def test_found_again_until_something_changes(self, write, tokenizer, cache):
        def files():
            return {file.name: file.stat().st_ino for file in cache.glob("*.arrow")}

        path = write([row("a"), row("b")])
        load_rows(path, tokenizer, max_prompt_tokens=100)
        before = files()
        assert len(load_rows(path, tokenizer, max_prompt_tokens=100)) == 2 and files() == before
        changes = [{"max_prompt_tokens": 99}, {"limit": 1}, {"drop": ["duplicates"]}, {"template": "raw"}]
        changes += [{"template_args": {"m": 1}}, {"check": row_check("math")}, {"check": row_check("auto")}]
        for _ in range(2):
            for change in changes:
                load_rows(path, tokenizer, **{"max_prompt_tokens": 100} | change)
            assert len(files()) == 1 + len(changes)
        load_demonstrations(write([row("a", response="b")], "sft.jsonl"), tokenizer, max_tokens=100)
        assert len(load_rows(write([row("c")]), tokenizer, max_prompt_tokens=100)) == 1
        assert len(files()) == 3 + len(changes)

    def test_a_failure_leaves_nothing(self, write, tokenizer, cache):
        with pytest.raises(ValueError, match="row 300 has no prompt"):
            load_rows(write([row()] * 299 + [{}]), tokenizer, max_prompt_tokens=100)
        assert [file.suffix for file in cache.iterdir()] == [".lock"]

    def test_old_files_go_and_mapped_rows_stay(self, write, tokenizer, cache):
        rows = load_rows(write([row("old")]), tokenizer, max_prompt_tokens=100)
        for file in cache.iterdir():
            os.utime(file, (0, 0))
        load_rows(write([row("new")], "new.jsonl"), tokenizer, max_prompt_tokens=100)
        assert len(list(cache.iterdir())) == 2 and rows[0]["prompt"][0]["content"] == "old"

    def test_unwritable_is_no_cache(self, write, tokenizer, cache, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("PRIME_FAST_CACHE", str(tmp_path / "file"))
        assert len(load_rows(write([row()]), tokenizer, max_prompt_tokens=100)) == 1


ODD = (
    "messages",
    "instruction",
    "history",
    "system",
    "tools",
    "tool_calls",
    "chat_template_kwargs",
    "type",
    "text",
    "images",
    "ability",
)
ODD = (*ODD, "prompt", "role", "content", "reward_model", "extra_info")
KEYS = st.sampled_from([*shapes.QUESTIONS, *shapes.TRUTHS, *ODD])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
LIKELY = {
    "prompt": VALUES | st.text() | st.just(row()["prompt"]),
    "reward_model": VALUES | st.just({"ground_truth": 1}),
}
ROWS = st.dictionaries(KEYS, VALUES, max_size=5) | st.fixed_dictionaries({}, optional=LIKELY) | VALUES
LINES = (
    ROWS.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20) | st.just(json.dumps(row()).encode())
)


class TestFuzz:
    """Whatever the file holds, a row is taken or refused with its number, and with drop=["broken"] it is counted."""

    def check(self, path, tokenizer, total):
        try:
            rows = load_rows(path, tokenizer, max_prompt_tokens=40, drop=["broken"])
        except ValueError as error:
            assert "empty dataset" in str(error)
        else:
            assert len(rows) + rows.broken + rows.dropped == total
            assert all(rows[i]["prompt_ids"] and rows[i]["prompt"] for i in range(len(rows)))
            if not rows.broken:
                return
        with pytest.raises(ValueError, match=rf"(?s){path.name}, row [1-9]|empty dataset"):
            load_rows(path, tokenizer, max_prompt_tokens=40)

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(lines=st.lists(LINES.map(lambda line: line.replace(b"\n", b"")), max_size=6))
    def test_lines(self, lines, tokenizer, tmp_path):
        path = tmp_path / "fuzz.jsonl"
        path.write_bytes(b"\n".join(lines))
        self.check(path, tokenizer, sum(bool(line.strip()) for line in lines))

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(rows=st.lists(ROWS, max_size=6))
    def test_list(self, rows, tokenizer, tmp_path):
        path = tmp_path / "fuzz.json"
        path.write_text(json.dumps(rows))
        self.check(path, tokenizer, len(rows))

    def test_damaged_parquet(self, write, tokenizer):
        path = write([row(f"{i}", str(i)) for i in range(40)], "rows.parquet")
        good, rng = path.read_bytes(), random.Random(0)
        for _ in range(150):
            bad = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                bad[rng.randrange(len(bad))] = rng.randrange(256)
            path.write_bytes(bad[: rng.choice((None, None, rng.randrange(len(bad))))])
            try:
                rows = load_rows(path, tokenizer, max_prompt_tokens=100, drop=["broken"])
                assert len(rows) + rows.broken + rows.dropped <= 40
            except ValueError as error:
                assert "rows.parquet" in str(error) and "\n" not in str(error)
