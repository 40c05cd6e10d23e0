"""Which rows the evaluation during training sees."""

import json

import pytest

from prime_fast import preflight


@pytest.fixture
def files(workspace, tmp_path):
    rows = (workspace / "rows.jsonl").read_text().splitlines(keepends=True)
    paths = []
    for name, count in (("long", 40), ("short", 3), ("middle", 12)):
        changed = [json.loads(row) | {"data_source": name} for row in rows[:count]]
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in changed))
    return f"[{', '.join(map(str, paths))}]"


def held_out(configure, files, limit, *overrides):
    config = configure(f"data.eval={files}", f"data.eval_rows={limit}", *overrides)
    return preflight.load_inputs(config).eval


def places(rows, name):
    return [row["extra_info"]["index"] for row in rows if row["data_source"] == name]


@pytest.mark.parametrize(("limit", "long", "middle"), [(23, 10, 10), (30, 15, 12), (24, 11, 10), (400, 40, 12)])
def test_every_file_has_its_share(configure, files, limit, long, middle, capsys):
    rows = held_out(configure, files, limit)
    counts = {name: len(places(rows, name)) for name in ("long", "short", "middle")}
    assert counts == {"long": long, "short": 3, "middle": middle}
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("eval: ")]
    assert [line.split()[1:4] for line in told] == [
        [str(long), "of", "40"],
        ["3", "of", "3"],
        [str(middle), "of", "12"],
    ]
    assert ["a fixed random sample" in line for line in told] == [long < 40, False, middle < 12]


def test_the_sample_is_not_the_head_and_stays_the_same(configure, files):
    chosen = places(held_out(configure, files, 23), "long")
    assert chosen == sorted(set(chosen)) and max(chosen) >= 20 and chosen != list(range(10))
    assert places(held_out(configure, files, 23, "seed=7"), "long") == chosen


def test_too_long_rows_are_told(configure, files, capsys):
    rows = held_out(configure, files, 40, "data.max_prompt=8")
    assert rows and all(len(row["prompt_ids"]) <= 8 for row in rows)
    assert capsys.readouterr().out.count("too long") == 4  # of the rows to train on, and of three files


def test_no_evaluation(configure):
    assert preflight.load_inputs(configure("data.eval=[]")).eval is None
