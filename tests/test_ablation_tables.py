"""The tables of an ablation are what the files of its trials say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("ablation_tables")


def kept(folder, arm, seed, accuracy=None, seconds=10.0, status="finished", **settings):
    metrics = {"test/accuracy": accuracy, "ood/uniform/log_px/auroc": 0.5} if accuracy else {}
    trial = {"arm": arm, "seed": seed, "settings": settings, "status": status, "steps": 100, "seconds": seconds}
    (folder / f"{arm}-s{seed}.json").write_text(json.dumps(trial | {"metrics": metrics}))


@pytest.fixture
def folder(tmp_path):
    for seed, base in enumerate((0.90, 0.80, 0.85)):
        kept(tmp_path, "better", seed, base + 0.05 + 0.001 * seed, **{"sgld.steps": 5})
        kept(tmp_path, "same", seed, base + 0.01 * (seed - 1), seconds=40)
        kept(tmp_path, "baseline", seed, base, seconds=80)
        kept(tmp_path, "classifier", seed, base, seconds=5)
    kept(tmp_path, "better", 3, status="diverged", seconds=1)
    return tmp_path


def rows(text):
    head, _, *lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines()]
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


def test_an_arm_has_its_mean_and_interval_its_cost_and_its_diverged_trials(tables, folder):
    found = rows(tables.figures(folder))
    assert list(found) == ["baseline", "better", "same", "classifier"]
    assert found["baseline"]["accuracy"] == "0.850 ± 0.124"  # t(0.975, 2) 0.05 / sqrt 3
    assert found["baseline"]["cost of a step"] == "16.0"
    assert (found["baseline"]["in"], found["better"]["in"]) == ("80 s", "10 s")
    assert found["better"]["cost of a step"] == "2.0", "the trial that diverged is not timed"
    assert [found[arm]["diverged"] for arm in found] == ["0 of 3", "1 of 4", "0 of 3", "0 of 3"]


def test_recoveries_are_told_by_seed_and_figures_are_of_runs_that_got_to_their_end(tables, tmp_path):
    for seed, (status, rollbacks) in enumerate((("finished", 2), ("diverged", 10), ("finished", 0))):
        metrics = {"val/accuracy": 0.9 + 0.02 * seed, "val/nll": 0.1}
        trial = {"arm": "wild", "seed": seed, "status": status, "rollbacks": rollbacks, "metrics": metrics}
        (tmp_path / f"wild-s{seed}.json").write_text(json.dumps(trial))
    found = rows(tables.recoveries(tmp_path))["wild"]
    assert (found["finished"], found["rollbacks, by seed"]) == ("2 of 3", "2, 10, 0")
    assert found["validation accuracy"].startswith("0.920")


def test_a_difference_is_paired_by_seed_and_bold_where_its_interval_excludes_0(tables, folder):
    found = rows(tables.differences(folder))
    assert "baseline" not in found
    assert found["better"]["accuracy"].startswith("**0.051 [0.04")
    assert found["same"]["accuracy"] == "0.000 [-0.025, 0.025]"


def test_scores_are_of_the_arms_that_are_asked_for(tables, folder):
    found = rows(tables.scores(["baseline", "classifier", "not there"], folder))
    assert list(found["uniform"]) == ["set", "score", "baseline", "classifier"]
    assert found["uniform"]["score"] == "log_px"


def test_settings_are_those_that_an_arm_changes(tables, folder):
    found = rows(tables.settings(folder))
    assert found["baseline"]["settings"] == "the base"
    assert found["better"]["settings"] == "sgld.steps 5"


def test_without_a_baseline_there_is_nothing_to_compare_with(tables, tmp_path):
    kept(tmp_path, "alone", 0, 0.9)
    with pytest.raises(ValueError, match="no trial of baseline"):
        tables.figures(tmp_path)


def test_the_best_rate_of_those_that_finished_is_bold(tables, tmp_path):
    def run(nll, status="finished"):
        return {"status": status, "steps": 1200, "val/nll": nll}

    arms = {"sam": {"1e-3": run(0.2), "4e-3": run(0.1), "5e-4": run(0.05, "diverged")}, "baseline": {"1e-3": run(0.3)}}
    (tmp_path / "tuning.json").write_text(json.dumps({"arms": arms}))
    found = rows(tables.tuning(tmp_path / "tuning.json"))
    assert list(found) == ["baseline", "sam"]
    assert found["sam"] == {"arm": "sam", "5e-4": "diverged, step 1,200", "1e-3": "0.2000", "4e-3": "**0.1000**"}
    assert found["baseline"] == {"arm": "baseline", "5e-4": "", "1e-3": "**0.3000**", "4e-3": ""}
