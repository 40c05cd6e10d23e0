import io
import math

import matplotlib.image
import pytest
from rich.console import Console

from prime_fast.metrics import MetricsLog
from prime_fast.views.report import PANELS, _alarms, phase_seconds, report, series, summary_table


def train_records(steps=10, prm=True):
    records = [{"step": 0, "eval_accuracy": 0.25, "eval_response_length": 30.0}]
    for step in range(1, steps + 1):
        record = {"step": step, "rollouts": 256 * step, "outcome": step / 20, "groups_kept": 0.5, "entropy": 0.1}
        record |= {"response_length": 36.0, "truncated": 0.0, "policy_grad_norm": 0.5, "tokens_per_second": 1000.0}
        record |= {"packing_efficiency": 0.975, "peak_memory_gib": 0.5 + step / 10, "skipped": 0, "seconds": 2.0}
        record |= {"seconds/generate": 1.0, "seconds/policy": 0.5}
        if prm:
            record |= {"prm_loss": 0.69, "prm_pair_accuracy": None if step == 1 else 0.6, "prm_grad_norm": 3.0}
            record |= {"seconds/prm": 0.25, "process_over_outcome": 0.3}
        if step % 5 == 0:
            record |= {"eval_accuracy": 0.25 + step / 20, "seconds/eval": 0.5}
        records.append(record)
    return records


def sft_records(steps=50):
    return [
        {"step": s, "loss": math.exp(-s / 20), "grad_norm": 1.0, "tokens_per_second": 2e4, "seconds": 0.1}
        for s in range(1, steps + 1)
    ]


def make_run(run_dir, records):
    log = MetricsLog(run_dir, len(records))
    for record in records:
        log.write(record)
    return str(run_dir)


def text_of(table, width=200):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def has_ink(path):
    image = matplotlib.image.imread(path)
    return image.shape[0] > 300 and image.shape[1] > 1000 and image[..., :3].std() > 0.02


def test_one_run_is_drawn_into_its_own_report(tmp_path):
    run = make_run(tmp_path / "prime", train_records())
    path = report([run])
    assert path == tmp_path / "prime" / "report" / "curves.png" and has_ink(path)


def test_different_runs_share_one_picture(tmp_path):
    runs = [
        make_run(tmp_path / "prime", train_records(30)),
        make_run(tmp_path / "rloo", train_records(10, prm=False)),
        make_run(tmp_path / "sft", sft_records()),
    ]
    path = report(runs, str(tmp_path / "pictures" / "all.png"))
    assert path == tmp_path / "pictures" / "all.png" and has_ink(path)
    assert not (tmp_path / "prime" / "report").exists()


@pytest.mark.parametrize(
    "records",
    [
        sft_records(),
        train_records(1),
        [{"step": 0, "eval_accuracy": 0.0}],
        [{"step": 1, "outcome": 0.0, "skipped": 1}],
        [{"step": 1, "seconds": 1.0, "seconds/new_phase": 0.5}],
    ],
    ids=["sft", "one step", "evaluation only", "nothing right", "only an unknown phase"],
)
def test_a_run_with_little_in_it_is_drawn_and_listed(tmp_path, records):
    run = make_run(tmp_path / "run", records)
    assert has_ink(report([run]))
    assert str(records[-1]["step"]) in text_of(summary_table([run]))


@pytest.mark.parametrize("panels", range(1, 12))
def test_any_number_of_panels_fits_the_grid(tmp_path, panels):
    keys = [panel.keys[0] for panel in PANELS[:panels]]
    records = [{"step": 1, "rollouts": 8, "seconds/generate": 1.0} | dict.fromkeys(keys, 0.5)]
    assert has_ink(report([make_run(tmp_path / "run", records)]))


def test_the_table_compares_runs(tmp_path):
    runs = [make_run(tmp_path / "prime", train_records()), make_run(tmp_path / "rloo", train_records(prm=False))]
    lines = {line.split("│")[1].strip(): line for line in text_of(summary_table(runs)).splitlines() if "│" in line}
    assert lines["held-out accuracy"].count("25.0% → 75.0%") == 2
    assert lines["gain"].count("+50.0 points") == 2
    assert lines["best"].count("75.0% at step 10") == 2
    assert lines["training outcome *"].count("15.0% → 40.0%") == 2
    assert lines["PRM pair accuracy *"].count("60.0% → 60.0%") == 1 and "- │" in lines["PRM pair accuracy *"]
    assert lines["rollouts"].count("2,560") == 2
    assert lines["packing efficiency"].count("97.5%") == 2
    assert lines["peak memory"].count("1.5 GiB") == 2
    assert lines["generate"].count("1.00 (10)") == 2
    assert lines["prm"].count("0.25 (2)") == 1
    assert lines["eval"].count("0.10 (1)") == 2
    assert lines["whole step"].count("2.00 (20)") == 2
    assert "SFT loss *" not in lines


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    runs = [make_run(tmp_path / name / "train", train_records(2)) for name in ("one", "two")]
    text = text_of(summary_table(runs))
    assert "one/train" in text and "two/train" in text


def test_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="holds no metrics.jsonl"):
        report([str(tmp_path / "nowhere")])
    assert not (tmp_path / "nowhere").exists()
    run = make_run(tmp_path / "empty", [])
    (tmp_path / "empty" / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="empty has no metrics yet"):
        report([run])
    with pytest.raises(ValueError, match="given twice"):
        summary_table([run, run])


def test_series_and_phase_totals():
    records = train_records(10)
    assert series(records, "eval_accuracy", "rollouts") == ([0, 1280, 2560], [0.25, 0.5, 0.75])
    assert len(series(records, "prm_pair_accuracy")[0]) == 9
    assert phase_seconds(records) == {"generate": 10.0, "prm": 2.5, "policy": 5.0, "eval": 1.0}


def test_alarms_shade_the_curves_of_their_metric(tmp_path):
    records = train_records()
    calm = matplotlib.image.imread(report([make_run(tmp_path / "calm", records)]))
    for record in records[4:7]:
        record["watch/entropy_collapse"] = 1
    assert _alarms(records, ("entropy",)) == [4, 5, 6] and not _alarms(records, ("outcome", "truncated"))
    shaded = matplotlib.image.imread(report([make_run(tmp_path / "alarm", records)]))
    reddish = (shaded[..., 0] > 0.9) & (shaded[..., 1] < 0.9) & (shaded[..., 1] > 0.7) & (shaded[..., 2] < 0.9)
    assert reddish.sum() > 1000 + ((calm[..., 0] > 0.9) & (calm[..., 1] < 0.9) & (calm[..., 1] > 0.7)).sum()
