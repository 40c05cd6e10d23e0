"""Rows of every shape people have, from their file through load_rows to the reward."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_data import byte_tokenizer, row, write_rows
from tokenizers.processors import TemplateProcessing

from prime_fast.data.rows import load_demonstrations, load_rows
from prime_fast.rewards import RewardPool, row_check, score

ROWS = Path(__file__).parent / "rows"
TEMPLATE = r"""
{%- if tools -%}
    {{ '<|im_start|>system\n' }}
    {%- for tool in tools -%}{{ tool | tojson + '\n' }}{%- endfor -%}
    {{ '<|im_end|>\n' }}
{%- endif -%}
{%- for m in messages -%}
    {{ '<|im_start|>' + m.role }}
    {%- if m.content -%}{{ '\n' + (m.content | trim if trimmed is defined else m.content) }}{%- endif -%}
    {%- for call in m.tool_calls or [] -%}
        {{ '\n<call>' + call.function.name + ' ' + call.function.arguments | tojson + '</call>' }}
    {%- endfor -%}
    {{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking -%}{{ '<think></think>\n' }}{%- endif -%}
{%- endif -%}"""


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, and a chat template that knows tools, tool calls and enable_thinking."""
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def base_tokenizer():
    """Bytes without a chat template, and a BOS before every text."""
    made = byte_tokenizer()
    made.chat_template = None
    made.add_special_tokens({"bos_token": "<|bos|>"})
    special = [("<|bos|>", made.bos_token_id)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=special)
    return made


@pytest.fixture(scope="module")
def pool():
    with RewardPool("auto", workers=1, timeout=60) as made:
        yield made


@pytest.fixture
def write(tmp_path):
    return lambda rows, name="rows.jsonl": write_rows(tmp_path / name, rows)


def chat(*turns):
    """Turns (role, text) as TEMPLATE writes them, and the begin of an answer."""
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def given(name):
    return [json.loads(line) for line in (ROWS / f"{name}.jsonl").read_text().splitlines()]


def load(path, tokenizer, reward="auto", **options):
    rows = load_rows(path, tokenizer, max_prompt_tokens=4000, check=row_check(reward), **options)
    return [rows[i] for i in range(len(rows))]


SUM = "```python\nprint(sum(map(int, input().split())))\n```"
STEPS = ("system", "Think in steps: [ASSESS], [ADVANCE], [OUTPUT].")
TOOL = json.dumps(given("tool_turns")[0]["tools"][0]) + "\n"
CALLED = [("assistant", '<call>temperature {"city": "Oslo"}</call>'), ("tool", "18")]
# file: its shape, and of each of its rows the turns of the prompt, a right and a wrong response
CASES = {
    "eurus": [
        "verl",
        ([STEPS, 1], r"1+3+5+7+9 = \boxed{25}", r"It is \boxed{24}"),
        ([STEPS, 1], SUM, SUM.replace("sum", "max")),
    ],
    "verl_readme": ["verl", ([0], "12 * 6\n#### 72", "#### 18")],
    "verl_gsm8k": ["verl", ([0], "480 and 1200.\n#### 1,680", "#### 1,200")],
    "dapo": ["verl", ([0], "180 = 4 * 9 * 5, so 3 * 3 * 2.\n\nAnswer: 18", "2 * 3 * 5 = 30.\n\nAnswer: 30")],
    "deepmath": ["openrlhf", (["question"], r"So \boxed{1.5}.", r"So \boxed{\frac{2}{3}}.")],
    "alpaca": [
        "alpaca",
        ([("user", "Give the greatest common divisor of the two numbers.\n84 and 36")], r"\boxed{12}", r"\boxed{6}"),
        (["instruction"], r"\boxed{2}", r"\boxed{1}"),
        (
            [
                ("system", "Answer with a number."),
                ("user", "What is the square of 6?"),
                ("assistant", "36"),
                ("user", "And of 7?"),
            ],
            r"\boxed{49}",
            r"\boxed{48}",
        ),
    ],
    "openrlhf": [
        "openrlhf",
        (
            [("user", "I have a sum."), ("assistant", "Go ahead."), ("user", "What is 17 + 26?")],
            "It is 43.",
            "It is 33.",
        ),
    ],
    "openrlhf_input": ["openrlhf", (["input"], "56", "54")],
    "messages": ["messages", (["problem"], r"$\boxed{7}$", r"$\boxed{13}$")],
    "trl_conversational": [
        "trl",
        ([("system", "Reason in <think> tags."), ("user", "What is $3^4$?")], r"<think>9*9</think>\boxed{81}", "12"),
    ],
    "content_parts": ["verl", ([("system", "Be brief."), ("user", "What is 11 * 11?")], "121", "111")],
    "tool_turns": [
        "verl",
        ([("system", TOOL), 0, *CALLED], r"\boxed{21}", r"\boxed{18}"),
        ([("system", TOOL), 0, *CALLED], r"\boxed{15}", r"\boxed{18}"),
    ],
    "json_strings": ["verl", ([("user", "What is 2 ** 10?")], "1024", "20")],
    "code": [
        "verl",
        ([0], "```python\ndef double(x):\n    return 2 * x\n```", "```python\ndef double(x):\n    return 5\n```"),
    ],
}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", CASES)
def test_from_file_to_reward(tokenizer, pool, write, name, form):
    (shape, *cases), originals = CASES[name], given(name)
    path = ROWS / f"{name}.jsonl"
    if form == "parquet":
        if name == "tool_turns":
            originals = originals[:1] * 2  # a column of a table has one type
            cases = cases[:1] * 2
        keys = dict.fromkeys(key for original in originals for key in original)
        path = write([{key: original.get(key) for key in keys} for original in originals], f"{name}.parquet")
    rows = load_rows(path, tokenizer, max_prompt_tokens=4000, check=row_check("auto"))
    assert rows.shape == [shape] and len(rows) == len(cases) and rows.raw == 0
    for i, (turns, right, wrong) in enumerate(cases):
        expected = []
        for turn in turns:  # a message of the row by its place, a column by its name, or what is to be there
            if isinstance(turn, int):
                turn = ("user", originals[i]["prompt"][turn]["content"])
            expected.append(("user", originals[i][turn]) if isinstance(turn, str) else turn)
        assert tokenizer.decode(rows[i]["prompt_ids"]) == chat(*expected)
        assert pool.score([right, wrong], [rows[i]] * 2) == [1.0, 0.0]


class TestPrefill:
    def test_is_continued_and_graded_with_its_continuation(self, tokenizer, pool):
        boxed, think = load(ROWS / "prefill.jsonl", tokenizer)
        asked = "<|im_start|>user\nWhat is {}?<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(boxed["prompt_ids"]) == asked.format("5 * 5") + "The answer is \\boxed{"
        assert tokenizer.decode(think["prompt_ids"]) == asked.format("6 * 6") + "<think>\n"
        responses = ["25}", "24}", "6*6</think>\\boxed{36}", "</think>\\boxed{35}"]
        assert pool.score(responses, [boxed, boxed, think, think]) == [1.0, 0.0, 1.0, 0.0]

    def test_what_a_template_trims_stays(self, tokenizer):
        rows = load(ROWS / "prefill.jsonl", tokenizer, template_args={"trimmed": True})
        assert tokenizer.decode(rows[1]["prompt_ids"]).endswith("<|im_start|>assistant\n<think>\n")

    def test_an_empty_one_is_none(self, tokenizer, write):
        path = write([row() | {"prompt": [*row()["prompt"], {"role": "assistant", "content": ""}]}])
        assert tokenizer.decode(load(path, tokenizer)[0]["prompt_ids"]) == chat(("user", "2+2?"))


class TestRaw:
    TEXT = given("trl_text")[0]["prompt"]

    @pytest.mark.parametrize("template", ["auto", "raw"])
    def test_texts_stand_as_they_are(self, tokenizer, base_tokenizer, pool, template):
        for made, bos in ((tokenizer, ""), (base_tokenizer, "<|bos|>")):
            (given_row,) = load(ROWS / "trl_text.jsonl", made, template=template)
            assert made.decode(given_row["prompt_ids"]) == bos + self.TEXT and given_row["prompt"] == self.TEXT
            assert pool.score([" 19", " 20"], [given_row] * 2) == [1.0, 0.0]

    def test_no_second_bos(self, base_tokenizer, write):
        path = write([{"prompt": "<|bos|>Already there", "answer": "1"}])
        (given_row,) = load(path, base_tokenizer)
        assert base_tokenizer.decode(given_row["prompt_ids"]) == "<|bos|>Already there"

    def test_a_tokenizer_that_ends_every_text(self, write):
        made = byte_tokenizer()
        ending = TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", made.eos_token_id)])
        made.backend_tokenizer.post_processor = ending
        with pytest.raises(ValueError, match="ends every text with <|im_end|>.* set add_eos_token to false"):
            load(write([{"prompt": "a", "answer": "1"}]), made)
        assert load(write([row()]), made)  # what a chat template wrote gets nothing added

    def test_chat_makes_it_a_message(self, tokenizer):
        (given_row,) = load(ROWS / "trl_text.jsonl", tokenizer, template="chat")
        assert tokenizer.decode(given_row["prompt_ids"]) == chat(("user", self.TEXT))

    @pytest.mark.parametrize("name", ["dapo", "deepmath", "openrlhf_input", "messages", "verl_readme"])
    def test_a_single_message_without_a_template(self, tokenizer, base_tokenizer, name):
        (asked,) = given(name)
        text = asked.get("question") or asked.get("input") or asked.get("problem") or asked["prompt"][0]["content"]
        for made, template, bos in ((base_tokenizer, "auto", "<|bos|>"), (tokenizer, "raw", "")):
            rows = load_rows(ROWS / f"{name}.jsonl", made, max_prompt_tokens=4000, template=template)
            assert made.decode(rows[0]["prompt_ids"]) == bos + text
            assert rows.raw == 1 and rows[0]["prompt"] == text and str(rows).endswith("(data.template)")

    def test_conversations_need_a_template(self, tokenizer, base_tokenizer):
        with pytest.raises(
            ValueError, match=r"row 1 has a prompt of 2 messages, .* the tokenizer has no chat template"
        ):
            load(ROWS / "eurus.jsonl", base_tokenizer)
        with pytest.raises(ValueError, match=r"row 1 has a prompt of 2 messages, .* data.template is raw"):
            load(ROWS / "eurus.jsonl", tokenizer, template="raw")
        with pytest.raises(ValueError, match="has no chat template: take an instruct model's"):
            load(ROWS / "eurus.jsonl", base_tokenizer, template="chat")

    def test_a_text_in_a_verl_row_needs_a_word(self, tokenizer, write):
        path = write([row() | {"prompt": "2+2="}])
        with pytest.raises(ValueError, match="row 1 has a prompt that is no list .* set data.template to chat if"):
            load(path, tokenizer)
        assert tokenizer.decode(load(path, tokenizer, template="raw")[0]["prompt_ids"]) == "2+2="
        assert tokenizer.decode(load(path, tokenizer, template="chat")[0]["prompt_ids"]) == chat(("user", "2+2="))


class TestTemplateArguments:
    def test_of_the_run_and_of_a_row(self, tokenizer, write):
        path = write([row(), row(chat_template_kwargs={"enable_thinking": True})])
        rows = load(path, tokenizer, template_args={"enable_thinking": False})
        closed, open_ = (tokenizer.decode(given_row["prompt_ids"]) for given_row in rows)
        assert open_ == chat(("user", "2+2?")) and closed == open_ + "<think></think>\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"enable_thinkng": False}, "template_args sets enable_thinkng, unknown to the chat template"),
            ({"tools": []}, "template_args cannot set tools"),
        ],
    )
    def test_mistakes(self, tokenizer, write, arguments, message):
        with pytest.raises(ValueError, match=message):
            load(write([row()]), tokenizer, template_args=arguments)


class TestTools:
    def test_a_table_fills_with_nulls_what_rows_lack(self, tokenizer, write):
        """Two tools with other parameters have one type in a table; the prompt must not tell."""
        tools = given("tool_turns")[0]["tools"]
        other = json.loads(json.dumps(tools[0]))
        del other["function"]["parameters"]["properties"]["unit"]
        rows = [{**given("tool_turns")[0], "tools": [tool]} for tool in (tools[0], other)]
        texts = [
            [tokenizer.decode(made["prompt_ids"]) for made in load(write(rows, name), tokenizer)]
            for name in ("rows.jsonl", "rows.parquet")
        ]
        assert pq.read_table(write(rows, "rows.parquet")).to_pylist() != rows  # there is something to undo
        assert texts[0] == texts[1] and "null" not in texts[0][0]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tools": ["hammer"]}, "row 1 has tools that are no list of JSON schemas"),
            ({"chat_template_kwargs": [1]}, "row 1 has chat_template_kwargs that are no object"),
            (
                {"prompt": [{"role": "assistant", "tool_calls": 5}, *row()["prompt"]]},
                "row 1 has a tool call that is no",
            ),
            ({"prompt": [{"role": "assistant", "content": None}]}, "row 1 has a prompt that is no list"),
            ({"prompt": given("tool_turns")[0]["prompt"][:2]}, "row 1 has a prompt that ends in a tool call"),
            (
                {"prompt": [{"role": "assistant", "tool_calls": [3], "content": None}, row()["prompt"][0]]},
                "has a tool call",
            ),
        ],
    )
    def test_mistakes(self, tokenizer, write, change, message):
        with pytest.raises(ValueError, match=message):
            load(write([row() | change]), tokenizer)

    def test_a_template_that_does_not_know_them(self):
        with pytest.raises(ValueError, match="row 1 has tools, which the chat template does not know"):
            load(ROWS / "tool_turns.jsonl", byte_tokenizer())


class TestRefused:
    @pytest.mark.parametrize("name", ["images", "image_parts"])
    def test_images(self, tokenizer, name):
        with pytest.raises(ValueError, match=rf"{name}.jsonl, row 1 has .*image.* leave such rows out with data.drop"):
            load(ROWS / f"{name}.jsonl", tokenizer)

    @pytest.mark.parametrize(
        ("change", "reward", "message"),
        [
            (
                {"ability": "logic"},
                "auto",
                'row 2 has ability "logic", which reward "auto" cannot score: set the reward',
            ),
            (
                {"ability": "Coding"},
                "math",
                'row 2 has ability "code", which reward "math" cannot score: use "code" or',
            ),
            ({"ability": 3}, "auto", 'row 2 has ability "3"'),
            ({"reward_model": {"ground_truth": ["1", "2"]}}, "auto", "row 2 has a ground truth that is neither"),
            (row(truth='{"inputs": [], "outputs": []}'), "auto", 'row 2 has tests for .* set it to "code"'),
            ({"reward_model": {"ground_truth": " "}}, "auto", "row 2 has no reward_model.ground_truth"),
            ({"ability": "code"}, "auto", "row 2 has tests that cannot be run"),
            (row(truth={"asserts": "x = 1"}, ability="code"), "auto", "row 2 has no test in its ground truth"),
            (row(truth={"inputs": [1], "outputs": []}, ability="code"), "auto", "row 2 has tests .* 1 inputs and 0"),
        ],
    )
    def test_rows_that_a_reward_cannot_score(self, tokenizer, write, change, reward, message):
        path = write([row(), row() | change])
        with pytest.raises(ValueError, match=f"rows.jsonl, .*{message}"):
            load(path, tokenizer, reward)
        assert len(load_rows(path, tokenizer, max_prompt_tokens=100)) == 2  # another reward may

    def test_a_wrong_row_is_told_before_any_is_tokenised(self, tokenizer, write, monkeypatch):
        path = write([row()] * 300 + [row(ability="logic")])
        monkeypatch.setattr("prime_fast.data.template.Template.apply", lambda *_: pytest.fail("too early"))
        with pytest.raises(ValueError, match="row 301 has ability"):
            load(path, tokenizer)


def test_the_answer_after_messages_is_a_demonstration(tokenizer):
    rows = load_demonstrations(ROWS / "messages.jsonl", tokenizer, max_tokens=4000)
    assert tokenizer.decode(rows[0]["prompt_ids"]) == chat(("user", given("messages")[0]["problem"]))
    assert tokenizer.decode(rows[0]["response_ids"][:-1]) == given("messages")[0]["messages"][1]["content"]


class TestOwnRewards:
    """A function of the user's, called with what its trainer would call it with."""

    @pytest.fixture
    def reward(self, tmp_path):
        def write(code):
            (tmp_path / "own.py").write_text(code)
            return f"{tmp_path / 'own.py'}:own"

        return write

    def test_trl_columns_as_trl_hands_them(self, tokenizer, reward):
        own = reward(
            "def own(prompts, completions, **columns):\n"
            "    assert columns == {'word': [columns['word'][0]], 'weights': [columns['weights'][0]]}, columns\n"
            "    assert prompts[0] in ('The sky is', 'Grass is')\n"
            "    return [float(text.strip() == word) for text, word in zip(completions, columns['word'])]\n"
        )
        rows = load(ROWS / "trl_columns.jsonl", tokenizer, own)
        assert score([" blue", " green", " green"], [rows[0], rows[1], rows[0]], reward=own) == [1.0, 1.0, 0.0]

    def test_trl_conversations(self, tokenizer, reward):
        own = reward(
            "def own(completions, solution, **columns):\n"
            "    assert set(columns) == {'prompts', 'level'}, columns\n"
            "    return [float(turns[0]['content'] == truth) for turns, truth in zip(completions, solution)]\n"
        )
        (given_row,) = load(ROWS / "trl_conversational.jsonl", tokenizer, own)
        assert score(["$81$", "81"], [given_row] * 2, reward=own) == [1.0, 0.0]

    def test_context_messages_without_a_label(self, tokenizer, reward, write):
        path = write([{"context_messages": row()["prompt"], "id": 7}])
        with pytest.raises(ValueError, match="row 1 has no reward_model.ground_truth"):
            load(path, tokenizer)
        own = reward("def own(completions, id): return [float(completions[0][0]['content'] == str(id[0]))]")
        assert score(["7", "8"], load(path, tokenizer, own) * 2, reward=own) == [1.0, 0.0]
        verl = reward("def own(data_source, solution_str, ground_truth): return 1.0")
        with pytest.raises(ValueError, match="requires ground_truth, which the rows do not have"):
            score(["7"], load(path, tokenizer, verl), reward=verl)

    def test_trl_signature_on_verl_rows(self, tokenizer, reward):
        own = reward(
            "def own(completions, ground_truth, reward_model, **columns):\n"
            "    assert set(columns) == {'prompts', 'data_source', 'ability', 'extra_info'}, columns\n"
            "    assert columns['ability'] == ['MATH'] and reward_model[0]['ground_truth'] == ground_truth[0]\n"
            "    return [float(completions[0][0]['content'] == ground_truth[0])]\n"
        )
        (given_row,) = load(ROWS / "dapo.jsonl", tokenizer, own)
        assert score(["18", "19"], [given_row] * 2, reward=own) == [1.0, 0.0]

    def test_an_exotic_ability_with_its_own_reward(self, tokenizer, reward, write):
        own = reward("def own(data_source, solution_str, ground_truth): return float(solution_str == ground_truth)")
        (given_row,) = load(write([row(ability="logic")]), tokenizer, own)
        assert score(["4", "5"], [given_row] * 2, reward=own) == [1.0, 0.0]
