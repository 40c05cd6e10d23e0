"""prime-fast show: what is read, what is written, and the page as a browser draws it."""

import json
import random
import re
from types import SimpleNamespace

import browser
import matplotlib.image
import numpy as np
import pytest

from prime_fast.cli import main
from prime_fast.views.show import page, picture
from prime_fast.views.show.record import parsed, pieces, record, rounded, steps_of, visible

HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    '"><svg onload=window.hacked=1>',
    "<!--<script>",
    "{{data}} {{script}} $& \\u003c/script>",
    "javascript:window.hacked=1",
    "\u202eabc\u2066\u200f",
    "\0\x1b[31m\x7f\x85",
    "\ud83d",
    "\ude00 \udfff",
    "\u2028\u2029",
    "\U000e0041\ufeff",
    "a\u0301 👩\u200d🔬 שלום 你好",
    "\n\t\n",
    "",
]


def line(**known) -> dict:
    count = len(known.setdefault("pieces", ["a ", "b\n", "c"]))
    numbers = {"reward": [0.1] * count, "advantage": [1.0] * count, "value": [0.5] * count}
    return numbers | {"step": 1, "row": 0, "group": 0, "outcome": 1.0, "prompt": "?"} | known


def write(path, *lines, end="\n"):
    path.write_text("\n".join(map(json.dumps, lines)) + end)
    return path


def data_of(html: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(found)


class TestPieces:
    def test_joined_they_are_the_text(self, byte_tokenizer):
        draw = random.Random(0)
        for _ in range(200):
            tokens = [draw.randrange(len(byte_tokenizer)) for _ in range(draw.randint(1, 30))]
            found = pieces(tokens, byte_tokenizer)
            assert "".join(found) == byte_tokenizer.decode(tokens) and len(found) == len(tokens)
            without = SimpleNamespace(decode=byte_tokenizer.decode)  # as a tokenizer that is all Python
            assert "".join(pieces(tokens, without)) == byte_tokenizer.decode(tokens)

    def test_a_character_is_its_last_tokens(self, byte_tokenizer):
        text = "one 你 👩 42"
        tokens = [*byte_tokenizer(text)["input_ids"], byte_tokenizer.eos_token_id]
        for tokenizer in (byte_tokenizer, SimpleNamespace(decode=byte_tokenizer.decode)):
            found = pieces(tokens, tokenizer)
            where = found.index("你")
            assert found[where - 2 : where] == ["", ""] and "👩" in found and "\ufffd" not in "".join(found)
            assert found[-1] == "<eos>" and found[0] == "one"

    def test_four_digits_are_kept(self):
        values = [0.0, 123456.0, -0.000123456, 9.9999, -2 / 3, 1e-30, 5e-7]
        assert rounded(values) == [0.0, 123500.0, -0.0001235, 10.0, -0.6667, 0.0, 5e-7]

    def test_a_record_is_what_is_read(self, byte_tokenizer):
        made = record([5, 6], byte_tokenizer, step=3, reward=np.float32([0.1, 1 / 3]), value=None, outcome=0.0)
        assert parsed(json.dumps(made), "x") == made and made["reward"] == [0.1, 0.3333] and "value" not in made


BAD = {
    "{": "is not JSON",
    "[]": 'is no object with "pieces"',
    '{"prompt": "a"}': 'is no object with "pieces"',
    '{"pieces": []}': '"pieces" is no list of texts',
    '{"pieces": ["a", 1]}': '"pieces" is no list of texts',
    '{"pieces": ["a", "b"], "reward": [1]}': '"reward" is no list of 2 numbers',
    '{"pieces": ["a"], "value": [NaN]}': '"value" is no list of 1 numbers',
    f'{{"pieces": ["a"], "reward": [1{"0" * 400}]}}': '"reward" is no list of 1 numbers',
    '{"pieces": ["a", "b"], "reward": [1e308, 1e308]}': '"reward" is no list of 2 numbers',
    "[" * 100_000: "is not JSON",
    '{"pieces": ["a"], "tokens": [1.5]}': '"tokens" is no list of 1 numbers',
    '{"pieces": ["a"], "step": "1"}': "\"step\" is '1', no int",
    '{"pieces": ["a", "b"], "steps": [[0, 1]]}': '"steps" are not [first, end] of one step after the other',
    '{"pieces": ["a", "b"], "steps": [[0, 0], [1, 2]]}': '"steps" are not',
    '{"pieces": ["a", "b"], "steps": 1}': '"steps" are not',
}


@pytest.mark.parametrize(
    ("text", "end"),
    [(text, "\n") for text in BAD] + [('{"pieces": ["a"], "value": [NaN]}', "")],
    ids=range(len(BAD) + 1),
)
def test_a_line_that_is_no_record_is_named(text, end, tmp_path, capsys):
    """Also the last one without an end, if it is no half of a record."""
    (tmp_path / "x.jsonl").write_text(json.dumps(line()) + "\n" + text + end)
    assert main(["show", str(tmp_path / "x.jsonl")]) == 2
    told = capsys.readouterr().err
    assert (
        f"x.jsonl line 2{'' if 'is no' in BAD[text][:5] or 'is not' in BAD[text] else ':'} " in told
        and BAD[text] in told
    )
    assert told.count("\n") == 1 and not (tmp_path / "x.html").exists()


def test_what_is_not_there_is_told_in_a_sentence(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    file = write(tmp_path / "x.jsonl", *(line(step=s, row=r, group=r) for s in (1, 2) for r in range(3, 20)))
    bare = write(tmp_path / "bare.jsonl", {"pieces": ["a"]})
    (tmp_path / "empty.jsonl").write_text("\n")
    for words, told in (
        ([tmp_path / "nothing"], "is no run_dir and no file"),
        ([run], "holds no tokens.jsonl; give the run_dir of a run that has trained on at least one group"),
        ([tmp_path / "empty.jsonl"], "empty.jsonl holds no response yet"),
        ([file, "--step", "3"], "has no response of step 3; there are 1, 2"),
        (
            [file, "--step", "2", "--row", "2"],
            "no response to row 2 in step 2; there are 3, 4, 5, 6, 7, 8, 9, 10, 11, 12",
        ),
        ([file, "--row", "99"], "14, ... 19"),
        ([bare, "--step", "1"], "its responses have no step; leave --step away"),
        ([bare, "--row", "4"], "no response to row 4; there is 0"),
        ([file, "--png", tmp_path / "x.png", "--response", "2"], "--response 2 is not there: the group has 1"),
        ([bare, "--png", tmp_path / "x.png"], "no number for its tokens"),
        ([file, "--response", "2"], "add --png FILE"),
        ([file, "--png", tmp_path / "x.png", "--out", tmp_path / "y"], "give one of the two"),
    ):
        assert main(["show", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1, error


def test_groups_of_a_run_stand_together(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    lines = [line(step=s, row=r, group=10 * s + r, outcome=k) for s in (1, 2) for r in (4, 7) for k in (0.0, 1.0)]
    write(run / "tokens.jsonl", *lines, end='\n{"step": 3, "pie')  # a kill in the middle of a line
    assert main(["show", str(run)]) == 0
    path = run / "report" / "show.html"
    assert f"8 responses in 4 groups, 2 steps: {path}" in capsys.readouterr().out
    found = data_of(path.read_text())
    assert [(g["step"], g["row"], [r["outcome"] for r in g["responses"]]) for g in found["groups"]] == [
        (s, r, [0.0, 1.0]) for s in (1, 2) for r in (4, 7)
    ]
    assert main(["show", str(run), "--step", "2", "--row", "7", "--out", str(tmp_path / "deep" / "x.html")]) == 0
    (group,) = data_of((tmp_path / "deep" / "x.html").read_text())["groups"]
    assert (group["step"], group["row"]) == (2, 7) and group["responses"][0]["steps"] == [[0, 2], [2, 3]]


def test_a_file_need_not_have_steps_or_rows(tmp_path):
    lines = [{"response": "no tokens"}, {"pieces": ["x"], "row": 5}, {"pieces": ["y"], "row": 5}, {"pieces": ["z"]}]
    found = page.choose(write(tmp_path / "x.jsonl", *lines), None, None)
    assert [["".join(r["pieces"]) for r in group] for group in found.groups] == [["no tokens"], ["x", "y"], ["z"]]
    assert data_of(page.page("x", found))["scale"] == {"reward": 1.0, "advantage": 1.0, "step": 1.0}
    (group,) = page.choose(tmp_path / "x.jsonl", None, 3).groups
    assert group[0]["pieces"] == ["z"]


def test_a_page_has_room_for_so_much(tmp_path):
    file = write(tmp_path / "x.jsonl", *(line(step=s, group=g) for s in range(1, 11) for g in range(2)))
    size = file.stat().st_size / 10
    for limit, steps in ((10, range(1, 11)), (5, range(2, 11, 2)), (3, (2, 6, 10)), (0, (10,))):
        found = page.choose(file, None, None, limit=int(limit * size * 1.02))
        assert {group[0]["step"] for group in found.groups} == set(steps) and len(found.groups) == 2 * len(steps)
    assert found.note == "2 responses in 2 groups: 1 of 10 steps fit in, evenly spread"


def test_what_has_no_picture_or_moves_others_gets_one():
    assert visible("a\0\x1b\u202e\ud83d\u2028\u200b\U000e0041") == "a␀␛⟨202E⟩⟨D83D⟩⟨2028⟩⟨200B⟩⟨E0041⟩"
    for text in ("plain\n\ttext", "a\u0301 👩\u200d🔬 שלום 你好 é"):
        assert visible(text) == text


def test_hostile_text_stays_data(tmp_path):
    file = write(tmp_path / "x.jsonl", line(pieces=HOSTILE, prompt="".join(HOSTILE)))
    html = page.page("".join(HOSTILE), page.choose(file, None, None))
    assert html.count("<script") == html.count("</script") == 2 and "<img" not in html and "hacked=1>" not in html
    assert html.isascii() or not re.search("[\u2028\u202e\ud800-\udfff\0]", html)
    html.encode()  # without surrogates
    (response,) = data_of(html)["groups"][0]["responses"]
    assert response["pieces"] == [visible(piece) for piece in HOSTILE]


def test_a_picture(tmp_path):
    rewards = [0.5, 0.0, -0.5] * 40
    tokens = [f"token{i} " + "\n" * (i % 6 == 5) for i in range(120)]
    file = write(tmp_path / "x.jsonl", line(pieces=tokens, reward=rewards, advantage=rewards, value=[0.5] * 120))
    assert main(["show", str(file), "--png", str(tmp_path / "deep" / "x.png"), "--response", "1"]) == 0
    image = (255 * matplotlib.image.imread(tmp_path / "deep" / "x.png")[..., :3]).astype(int)
    blue, orange = (
        (abs(image - np.array([255 + 0.78 * (c - 255) for c in hue])).max(-1) < 3).sum()
        for hue in (picture.POSITIVE, picture.NEGATIVE)
    )
    assert blue > 10_000 and 0.5 < blue / orange < 2


def test_lines_of_a_picture():
    """Steps begin lines; what is longer than a line goes on in the next, and wide characters take two places."""
    found = list(picture.layout(["ab", "c\n", "d", "你" * 60, "e"], [[0, 3], [3, 5]]))
    assert [(p.line, p.column, p.text, p.width, p.token) for p in found if p.width] == [
        (0, 0, "ab", 2, 0),
        (0, 2, "c↵", 2, 1),
        (1, 0, "d", 1, 2),
        (2, 0, "你" * 46, 92, 3),
        (3, 0, "你" * 14, 28, 3),
        (3, 28, "e", 1, 4),
    ]
    assert steps_of({"pieces": ["a", "b\n", "c"]}) == [[0, 2], [2, 3]]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.path() is None:
        pytest.skip(f"none of {', '.join(browser.NAMES)} is installed (apt-get install chromium)")
    try:
        made = browser.Browser(tmp_path_factory.mktemp("browser"))
    except (EOFError, BrokenPipeError) as error:  # a stand-in of the distribution, which asks to install the real one
        pytest.skip(f"{browser.path()} does not start: {error}")
    yield made
    made.close()


def drawn(chromium, folder, *lines):
    """Their page, open, having asked nothing of the network and without an error."""
    path, _ = page.show(str(write(folder / "x.jsonl", *lines)))
    chromium.errors.clear()
    chromium.asked.clear()
    chromium.open(path)
    assert chromium.asked == [path.as_uri()]
    return path


def test_a_browser_draws_colours_and_numbers(chromium, tmp_path):
    rewards = [[0.3, 0.0, -0.3, 0.1], [-0.2, 0.02, 0.0, 0.0]]
    lines = [
        line(pieces=["one", " two,", " three", "$"], steps=[[0, 2], [2, 4]], reward=reward, outcome=outcome, group=g)
        | {"advantage": [outcome - 0.5] * 4, "value": [0.5, 0.5, 0.9, 0.1], "tokens": [7, 8, 9, 1]}
        for g in range(3)
        for outcome, reward in zip((1.0, 0.0), rewards, strict=True)
    ]
    drawn(chromium, tmp_path, *lines)
    assert chromium.run("[...document.querySelectorAll('article')].map(a => a.querySelector('h3').innerText)") == [
        "✓ 1\ntokens 4\nreward +0.1\nadvantage +0.5",
        "✗ 0\ntokens 4\nreward −0.18\nadvantage −0.5",
    ]
    assert chromium.run("[...document.querySelectorAll('article:first-child s')].map(s => s.textContent)") == [
        "+0.300",
        "−0.200",
    ]
    color = "getComputedStyle(document.querySelector('article .row:nth-child({}) .t:nth-child({})')).backgroundColor"
    colors = [chromium.run(color.format(row, place)) for row, place in ((1, 1), (1, 2), (2, 1))]
    assert len(set(colors)) == 3 and chromium.run("document.querySelectorAll('svg path.mark').length") == 4
    light = chromium.screenshot(tmp_path / "light.png")
    assert chromium.run("location.hash") == "#3.1" and chromium.run("document.querySelector('#next').disabled")

    chromium.move("article:nth-child(2) .t")  # hovering
    tip = "document.querySelector('#tip').innerText.split('\\n').filter(Boolean).join(' ')"
    assert chromium.run(tip) == (
        "one token 1 of 4, id 7, step 1 of 2 reward −0.2 of the step −0.18 so far −0.2 advantage −0.5 value 0.5"
    )
    chromium.move("header")
    assert chromium.run("document.querySelector('#tip').hidden")
    chromium.move("article:nth-child(2) .row:nth-child(2) .t", click=True)  # holding, and its neighbour
    chromium.move("header")
    chromium.press(".")
    assert chromium.run(tip).startswith("$ token 4 of 4") and chromium.run("chosen") == 1
    assert chromium.run("[...document.querySelectorAll('article:nth-child(2) output')].map(o => o.textContent)") == [
        "0.1",
        "−0.18",
    ]
    chromium.press("Escape", "k")
    assert chromium.run("document.querySelector('#tip').hidden && !document.querySelector('.at')")
    assert chromium.run("location.hash") == "#3.1"

    chromium.press("2")
    assert chromium.run("document.querySelector('[aria-pressed=true]').textContent") == "Advantage"
    again = [chromium.run(color.format(row, place)) for row, place in ((1, 1), (1, 2), (2, 1))]
    assert again == [colors[0]] * 3
    chromium.press("3", "d")
    assert chromium.run("document.querySelector('article s').textContent") == "0.500"
    dark = matplotlib.image.imread(chromium.screenshot(tmp_path / "dark.png"))[..., :3]
    assert dark.mean() < 0.3 < 0.8 < matplotlib.image.imread(light)[..., :3].mean()
    chromium.press("ArrowLeft", "ArrowLeft", "ArrowLeft")
    assert chromium.run(
        "[at, document.querySelector('#groups').value, document.querySelector('#previous').disabled]"
    ) == [
        0,
        "step 1 · row 0 · ✓✗",
        True,
    ]
    chromium.move("#next", click=True)
    assert chromium.run("at") == 1 and not chromium.errors


def test_a_browser_runs_nothing_that_a_model_wrote(chromium, tmp_path):
    drawn(chromium, tmp_path, *(line(pieces=HOSTILE, prompt="-".join(HOSTILE)) for _ in range(2)))
    shown = chromium.run("[...document.querySelectorAll('article:first-child .t')].map(t => t.textContent)")
    assert shown == [visible(piece).replace("\n", "↵\n") for piece in HOSTILE]
    assert chromium.run("document.querySelector('#prompt .text').textContent") == visible("-".join(HOSTILE))
    for number in range(len(HOSTILE)):
        chromium.run(f"point(cards[0], {number})")
    assert (
        chromium.run(
            "[...document.querySelectorAll('body *')].map(e => e.tagName).filter(n => /IMG|IFRAME/.test(n)).length"
        )
        == 0
    )
    assert chromium.run("document.scripts.length") == 2 and not chromium.run("'hacked' in window")
    assert not chromium.errors


def test_a_browser_draws_what_little_there_is(chromium, tmp_path):
    bare = {"pieces": ["a", "b"], "group": 1}
    drawn(chromium, tmp_path, bare, bare | {"advantage": [1, -1]})
    numbers = "[...document.querySelectorAll('article s')].map(s => s.textContent)"
    assert chromium.run(numbers) == ["", "0.00"] and chromium.run("document.querySelectorAll('svg').length") == 0
    drawn(chromium, tmp_path, {"response": "all of it"})
    assert chromium.run("document.querySelector('#modes').children.length") == 0
    chromium.press("1", "ArrowRight", "j", ".")
    chromium.move("article .t")
    assert chromium.run("document.querySelector('#tip').innerText").startswith("all of it") and not chromium.errors


def test_a_browser_draws_64k_tokens(chromium, tmp_path):
    count, draw = 1 << 16, random.Random(0)
    tokens = [f" {draw.randrange(1000)}" + "\n" * (i % 50 == 49) for i in range(count)]
    rewards = [round(draw.gauss(0, 0.1), 3) for _ in range(count)]
    drawn(chromium, tmp_path, line(pieces=tokens, reward=rewards, advantage=[1.0] * count, value=[0.5] * count))
    assert chromium.run("document.querySelectorAll('article .t').length") == count
    laid_out = "[...document.querySelectorAll('.row')].map(r => r.checkVisibility({contentVisibilityAuto: true}))"
    rows = chromium.run(laid_out)
    assert len(rows) > 1000 and 0 < sum(rows) < 200  # those in view, and a few about them
    assert (
        len(chromium.run("document.querySelectorAll('svg')[1].querySelectorAll('path')[1].getAttribute('d')")) < 20_000
    )
    chromium.move("svg", click=True)  # the middle of the curve: there the text goes
    where = "(b => b.top > 0 && b.bottom < innerHeight)(document.querySelector('.at').getBoundingClientRect())"
    assert chromium.run("held.i") == count // 2 and chromium.run(where)
    image = matplotlib.image.imread(chromium.screenshot(tmp_path / "long.png"))[..., :3]
    assert image.std() > 0.05 and not chromium.errors
