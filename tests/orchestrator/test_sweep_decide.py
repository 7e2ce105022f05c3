"""Finalists, the decision over seeds, the winner's recipe, and the summary of it all."""

import json
import math

import pytest
import yaml
from made_sweeps import SWEEP, figures_of, made_finalist, made_search, made_trial, sweep_of
from scipy import stats

from jem.files import Location
from jem.settings import digest
from orchestrator.config import load_run_config
from orchestrator.sweep.config import trial_config
from orchestrator.sweep.decide import decide, finalists, over_seeds, ranking, spread, winner_recipe
from orchestrator.sweep.summary import seeds_summary, summary
from orchestrator.sweep.table import read_trials

POINT = {"sgld.step_size": 0.5, "sgld.noise_scale": 0.02, "sgld.steps": 5, "objective.energy_l2": 0.01}
BASE = (0.10, 0.11, 0.12, 0.10, 0.12)
BETTER = (0.07, 0.08, 0.10, 0.07, 0.08)
TWO = SWEEP + "objective: [val/accuracy, val/ood/interp/log_px/auroc]\n"


def read(root):
    return read_trials(Location.of(root))


def trained(root, candidate, figures, point=None, key="val/nll"):
    """The finalists' trials of a candidate, seeds 1, 2, ...: a figure, or the status of one without."""
    for seed, figure in enumerate(figures, 1):
        status, metrics = (figure, {}) if isinstance(figure, str) else ("finished", {key: figure, "test/nll": 9.0})
        made_finalist(root, candidate, seed, point or {}, status, metrics, number=seed, message="energy gap 1e+06")


def decided(folder, text=SWEEP, key="val/nll", **candidates):
    """The decision on what finalists gave: base=..., t001=..."""
    sweep = sweep_of(folder, text)
    for number, (name, figures) in enumerate(candidates.items()):
        trained(folder, name, figures, {} if name == "base" else POINT | {"sgld.steps": 2 + number}, key)
    return decide(read(folder), sweep), sweep


def test_a_spread_is_mean_and_t_interval():
    found = spread(dict(enumerate(BASE)))
    low, high = stats.t.interval(0.95, 4, loc=found.mean, scale=stats.sem(BASE))
    assert (found.mean, found.low, found.high) == pytest.approx((0.11, low, high))
    assert found.half == pytest.approx(high - 0.11)
    alone = spread({3: 0.5})
    assert (alone.mean, alone.low, alone.high, alone.half) == (0.5, None, None, None)


def test_ranking_is_of_finished_trials_of_the_search_best_first(tmp_path):
    sweep = sweep_of(tmp_path)
    for name, figure in (("t000", 0.3), ("t001", 0.2), ("t002", 0.4)):
        made_trial(tmp_path, name, {}, metrics={"val/nll": figure})
    made_trial(tmp_path, "t003", {}, "pruned", {"val/nll": 0.1})
    made_trial(tmp_path, "t004", {}, "diverged", {"val/nll": 0.1})
    trained(tmp_path, "t002", (0.01,))
    assert [row.name for row in ranking(read(tmp_path), sweep)] == ["t001", "t000", "t002"]


def test_ranking_by_several_objectives_is_by_front_and_then_by_the_first(tmp_path):
    sweep = sweep_of(tmp_path, TWO)
    figures = {"t000": (0.9, 0.5), "t001": (0.8, 0.9), "t002": (0.89, 0.5), "t003": (0.85, 0.4), "t004": (0.95, 0.1)}
    for name, (accuracy, auroc) in figures.items():
        metrics = {"val/accuracy": accuracy, "val/ood/interp/log_px/auroc": auroc}
        made_trial(tmp_path, name, {}, metrics=metrics)
    # t004, t000 and t001 are dominated by none; t002 by t000 alone, t003 by t002 too
    assert [row.name for row in ranking(read(tmp_path), sweep)] == ["t004", "t000", "t001", "t002", "t003"]


def test_finalists_are_the_base_and_the_best_others(tmp_path):
    sweep = sweep_of(tmp_path)
    for number, figure in enumerate((0.1, 0.3, 0.2, 0.4)):
        made_trial(
            tmp_path, f"t00{number}", POINT | {"sgld.steps": 2 + number} if number else {}, metrics={"val/nll": figure}
        )
    rows = read(tmp_path)
    assert finalists(rows, sweep) == [
        ("base", {}),
        ("t002", POINT | {"sgld.steps": 4}),
        ("t001", POINT | {"sgld.steps": 3}),
    ]
    assert finalists(rows, sweep_of(tmp_path, SWEEP, "finalists=0")) == []
    assert finalists(rows[:1], sweep) == []  # there is nothing to compare the base with


def test_a_point_that_is_the_base_or_a_better_one_again_is_no_finalist(tmp_path):
    sweep = sweep_of(tmp_path)
    same = {"sgld.step_size": sweep.run.sgld.step_size, "sgld.steps": sweep.run.sgld.steps}
    for name, point, figure in (("t001", same, 0.1), ("t002", POINT, 0.2), ("t003", POINT, 0.3)):
        made_trial(tmp_path, name, point, metrics={"val/nll": figure})
    assert finalists(read(tmp_path), sweep) == [("base", {}), ("t002", POINT)]


def test_a_candidate_beats_the_base_if_the_interval_of_the_paired_difference_excludes_0(tmp_path):
    decision, _ = decided(tmp_path, base=BASE, t001=BETTER)
    winner = decision.of("t001")
    assert (decision.stage, decision.winner, winner.beats_base) == ("finalists", "t001", True)
    difference = [a - b for a, b in zip(BETTER, BASE, strict=True)]
    low, high = stats.t.interval(0.95, 4, loc=sum(difference) / 5, scale=stats.sem(difference))
    paired = winner.against_base
    assert (paired.mean, paired.low, paired.high) == pytest.approx((-0.03, low, high))
    assert paired.values == pytest.approx(dict(enumerate(difference, 1)))
    text = f"t001 beats the base: val/nll 0.080 against 0.110, difference -0.030 [{low:.3f}, {high:.3f}] over 5 seeds."
    assert decision.verdict == text


def test_the_pairing_shows_what_the_means_alone_would_hide(tmp_path):
    base = (0.10, 0.20, 0.30, 0.40, 0.50)
    decision, _ = decided(tmp_path, base=base, t001=tuple(x - 0.01 - i / 1e3 for i, x in enumerate(base)))
    winner, reference = decision.of("t001"), decision.of("base")
    assert winner.beats_base
    assert winner.metrics["val/nll"].high > reference.metrics["val/nll"].low  # the intervals overlap by far


def test_where_more_is_better_a_greater_figure_wins(tmp_path):
    text = SWEEP + "objective: val/accuracy\n"
    up = tuple(x + 0.03 + i / 1e3 for i, x in enumerate(BASE))
    down = tuple(x - 0.03 - i / 1e3 for i, x in enumerate(BASE))
    decision, _ = decided(tmp_path, text, "val/accuracy", base=BASE, t001=down, t002=up)
    assert decision.winner == "t002"
    assert [decision.of(name).beats_base for name in ("base", "t001", "t002")] == [False, False, True]


def test_a_better_mean_whose_difference_may_be_0_does_not_beat_the_base(tmp_path):
    decision, _ = decided(tmp_path, base=BASE, t001=(0.05, 0.14, 0.10, 0.13, 0.09))
    assert (decision.winner, decision.of("t001").beats_base) == ("t001", False)
    assert decision.verdict.startswith("No candidate beats the base: t001 has val/nll 0.102 against 0.110, difference")
    assert "t001 is the winner by its mean alone" in decision.verdict


def test_the_base_stays_if_it_is_the_best(tmp_path):
    decision, _ = decided(tmp_path, base=BETTER, t001=BASE)
    assert (decision.winner, decision.of("base").against_base) == ("base", None)
    assert decision.verdict.startswith("No candidate beats the base: t001 has val/nll 0.110 against 0.080")
    assert decision.verdict.endswith("The base stays.")


def test_a_candidate_of_which_a_seed_diverged_neither_wins_nor_beats_the_base(tmp_path):
    decision, _ = decided(tmp_path, base=BASE, t001=(*BETTER[:4], "diverged"), t002=BASE)
    candidate = decision.of("t001")
    assert (candidate.finished, candidate.diverged, candidate.failed, len(candidate.seeds)) == (4, 1, 0, 5)
    assert candidate.against_base.high < 0
    assert not candidate.beats_base
    assert decision.winner in ("base", "t002")
    assert "t001 4 of 5 (1 diverged)" in decision.verdict


def test_where_no_candidate_finished_all_seeds_the_one_with_the_most_wins(tmp_path):
    decision, _ = decided(
        tmp_path, base=(0.01, "failed", "diverged"), t001=(0.2, 0.2, "failed"), t002=(0.1, "failed", 0.2)
    )
    assert decision.winner == "t002"


def test_seeds_that_time_did_not_suffice_for_count_for_nobody(tmp_path):
    """The base comes first within each seed: who has one seed more is compared by luck."""
    base, better = (0.50, 0.52, 0.01), (0.40, 0.44, "out of time")
    decision, _ = decided(tmp_path, base=base, t001=better)
    assert (decision.winner, decision.cut) == ("t001", [3])
    assert [c.seeds for c in decision.candidates] == [[1, 2], [1, 2]]
    assert "budget.minutes did not suffice for 1 seed (3) of all finalists" in decision.verdict
    assert "Not all seeds finished" not in decision.verdict


def test_where_no_seed_was_trained_by_all_the_search_decides(tmp_path):
    made_trial(tmp_path, "t000", {}, metrics={"val/nll": 0.3})
    made_trial(tmp_path, "t001", POINT, metrics={"val/nll": 0.2})
    decision, _ = decided(tmp_path, base=(0.1,), t001=("out of time",))
    assert (decision.stage, decision.winner) == ("search", "t001")
    assert "no finalists were trained to the end. budget.minutes did not suffice for 1 seed (1)" in decision.verdict


@pytest.mark.parametrize(("base", "other"), [((0.50, 0.60), (0.49, 0.59)), ((0.1, 0.2, 0.3), (0.0, 0.1, 0.2))])
def test_equal_differences_are_no_certainty(tmp_path, base, other):
    decision, _ = decided(tmp_path, base=base, t001=other)
    paired = decision.of("t001").against_base
    assert paired.low == paired.high == paired.mean
    assert not decision.of("t001").beats_base
    assert decision.verdict.startswith("No candidate beats the base")


def test_without_a_base_that_finished_nothing_is_compared(tmp_path):
    decision, _ = decided(tmp_path, base=("diverged",) * 3, t001=BETTER[:3])
    assert decision.winner == "t001"
    assert "which finished 0 of its 3 seeds" in decision.verdict


def test_one_seed_gives_a_difference_without_an_interval_and_no_victory(tmp_path):
    decision, _ = decided(tmp_path, base=BASE[:1], t001=BETTER[:1])
    assert (decision.winner, decision.of("t001").beats_base) == ("t001", False)
    assert "difference -0.030 without an interval over 1 seed" in decision.verdict


def test_without_finalists_the_search_decides_and_says_that_it_is_one_seed(tmp_path):
    sweep = sweep_of(tmp_path)
    for name, point, figure in (("t000", {}, 0.103), ("t001", POINT, 0.071)):
        made_trial(tmp_path, name, point, metrics={"val/nll": figure})
    decision = decide(read(tmp_path), sweep)
    assert (decision.stage, decision.winner, decision.of("t001").beats_base) == ("search", "t001", False)
    assert decision.verdict.startswith("t001 has the best val/nll of the search, 0.071 against the base's 0.103.")
    assert "one seed each, without an interval" in decision.verdict


def test_without_a_finished_trial_there_is_no_winner_and_no_recipe(tmp_path):
    sweep = sweep_of(tmp_path)
    made_trial(tmp_path, "t000", {}, "diverged")
    decision = decide(read(tmp_path), sweep)
    assert (decision.winner, decision.verdict) == (None, "Nothing can be decided: no trial finished with a val/nll.")
    with pytest.raises(ValueError, match="no trial finished"):
        winner_recipe(sweep, decision)
    assert "diverged: t000 at step 300: no reason is known" in summary(read(tmp_path), sweep, decision)
    assert decide([], sweep).winner is None


def test_a_decision_is_json(tmp_path):
    decision, _ = decided(tmp_path, base=BASE, t001=BETTER)
    read_again = json.loads(decision.json())
    assert read_again["winner"] == "t001"
    assert read_again["candidates"][1]["metrics"]["val/nll"]["values"]["3"] == 0.10
    assert "test/nll" not in read_again["candidates"][1]["metrics"]  # decided on validation alone


def test_over_seeds_are_all_measured_figures_of_the_finished_runs(tmp_path):
    for seed, figure in enumerate((0.1, 0.2, 0.3)):
        metrics = {"test/nll": figure, "ood/interp/log_px/auroc": 0.9, "val/nll": figure, "train/loss": 1.0}
        metrics |= {"robust/linf/0.1/worst/accuracy": 0.5, "robust_k10/clean/accuracy": 0.9}
        metrics |= {"gen/fresh/fid_lenet": 2.0, "chains/1x/energy": 1.0}
        made_trial(tmp_path, f"s{seed}", {}, metrics=metrics, stage="seeds", candidate="base", seed=seed)
    made_trial(tmp_path, "s3", {}, "failed", {"test/nll": 7.0}, stage="seeds", seed=3, message="no room")
    rows = read(tmp_path)
    found = over_seeds(rows)
    assert set(found) == {*metrics} - {"train/loss"}
    assert found["test/nll"]["values"] == {0: 0.1, 1: 0.2, 2: 0.3}
    assert found["test/nll"]["mean"] == pytest.approx(0.2)
    assert found["test/nll"]["high"] - 0.2 == pytest.approx(stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3))
    text = seeds_summary(rows, "digits")
    assert "| test/nll | 0.200 [-0.048, 0.448] | 0.100 | 0.200 | 0.300 |" in text
    assert "3 of 4 seeds finished" in text
    assert "no room" in text


def test_the_recipe_gives_the_winners_run_again_measured_and_registered_as_the_base(tmp_path):
    decision, sweep = decided(tmp_path, SWEEP + "settings: {optimizer.warmup_steps: 7}\n", base=BASE, t001=BETTER)
    text = winner_recipe(sweep, decision)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    config, base = load_run_config(str(path), []), load_run_config("digits", [])
    wanted = trial_config(sweep, decision.of("t001").point)
    assert digest(config.science | {"seed": 0}) == digest(wanted.science | {"seed": 0})
    assert config.sgld.steps == 3
    assert config.optimizer.warmup_steps == 7
    assert (config.steps, config.workers) == (wanted.steps, wanted.workers)
    assert (config.evaluate.suite, config.evaluate.register) == (base.evaluate.suite, base.evaluate.register)
    assert (wanted.evaluate.suite, wanted.evaluate.register) == ("none", False)
    assert config.name == f"recipe-{config.digest}"
    assert {"name", "storage_path", "tracking"}.isdisjoint(yaml.safe_load(text))
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert f"# The winner of the sweep {sweep.name}: t001, from the recipe digits." in head
    assert f"# {decision.verdict}" in head
    assert "# sgld.step_size 0.5" in head
    assert "# python jobs/train.py recipe.yaml" in head


def test_the_summary_begins_with_the_verdict_and_holds_what_it_rests_on(tmp_path):
    decision, sweep = decided(tmp_path, base=BASE, t003=BETTER, t001=(*BETTER[:4], "diverged"))
    made_search(tmp_path, sweep, 16)
    rows = read(tmp_path)
    text = summary(rows, sweep, decision)
    assert text.startswith(decision.verdict)
    assert "12 finished, 1 pruned, 2 diverged, 1 failed" in text
    assert "| **t003** | 5 of 5 | 0.080 ± " in text
    assert "| t001 | 4 of 5, 1 diverged |" in text
    assert "| base | 0.100 | 0.110 | 0.120 | 0.100 | 0.120 |" in text
    assert "- failed: t005 at step 20: RuntimeError: out of memory" in text
    assert "- diverged: f-t001-s5 at step 300: energy gap 1e+06" in text
    assert "| sgld.step_size | loguniform 0.05 to 5 | always | 1 |" in text
    lines = text.partition("## Best of the search")[2].splitlines()
    shown = [line.split("|")[1].strip() for line in lines if line.startswith("| t0")]
    assert len(shown) == 10
    assert [name.split()[0] for name in shown] == [row.name for row in ranking(rows, sweep)[:10]]
    assert "Pareto" not in text


def test_every_table_of_the_summary_has_as_many_cells_in_each_row(tmp_path):
    sweep = sweep_of(tmp_path, TWO)
    made_search(tmp_path, sweep, 16)
    made_trial(tmp_path, "t020", {}, "failed", message="a | b\n<script>" + "x" * 500)
    for candidate, point in finalists(read(tmp_path), sweep):
        for seed in (1, 2):
            made_finalist(tmp_path, candidate, seed, point, metrics=figures_of(sweep, point, seed))
    rows = read(tmp_path)
    text = summary(rows, sweep, decide(rows, sweep))
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5  # space, finalists, by seed, front, best
    for lines in tables:
        assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    assert "## Pareto front" in text
    assert "<script>" not in text
    assert max(map(len, text.splitlines())) < 600


def test_a_sweep_that_goes_on_has_a_summary_without_a_verdict(tmp_path):
    sweep = sweep_of(tmp_path)
    made_search(tmp_path, sweep, 6)
    assert summary(read(tmp_path), sweep, None).startswith("The sweep goes on")
    assert summary([], sweep, None)
