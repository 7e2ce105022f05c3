"""Population-based training: who goes on from whom, and that chains and weights are handed on as they are."""

import json
import random
from types import SimpleNamespace

import pytest
from made_sweeps import sweep_of

from jem import checkpoint
from jem.files import Location
from orchestrator import events
from orchestrator.ray_cluster import Cluster
from orchestrator.runs import read_record
from orchestrator.sweep.fork import HANDED, Fork, hold, note, read_forks
from orchestrator.sweep.population import Stretch, evolve, explored, stretches
from orchestrator.sweep.table import Row, read_trials
from orchestrator.sweep.trial import Setting, Trial, Work

SWEEP = """
base: digits
scheduler: {name: pbt, interval_steps: 10}
budget: {trials: 4, steps: 30}
settings: {workers: 1, model.channels: [4], sgld.steps: 1, replay.capacity: 64, batch_size: 16, recovery.max: 0}
space:
  optimizer.learning_rate: {loguniform: [0.0001, 0.01]}
  sgld.step_size: {loguniform: [0.1, 10]}
"""


@pytest.fixture
def population(tmp_path):
    sweep = sweep_of(tmp_path, SWEEP, f"storage_path={tmp_path}")
    setting = Setting(sweep, Location.of(tmp_path / "sweep"), Cluster(True, 2, 0), 1.0)

    def train(number, until, **point):
        name = f"t{number:03}"
        full = {"optimizer.learning_rate": 0.001, "sgld.step_size": 1.0} | point
        work = Work(setting, Trial(name, "search", number, name if number else "base", full, 0, until))
        results = [work.next()]
        while not results[-1]["done"]:
            results.append(work.next())
        return SimpleNamespace(root=work.root, results=results)

    return SimpleNamespace(train=train, sweep=sweep, root=setting.root, trials=setting.root / "trials")


def shas(root, step):
    manifest = checkpoint.read_manifest(root / "checkpoints" / step)
    return {name: file["sha256"] for name, file in manifest.files.items() if name != "events.jsonl"}


def test_a_trial_waits_where_the_population_is_compared_and_goes_on_as_one_never_stopped(population):
    first = population.train(1, 10)
    assert [result["step"] for result in first.results] == [10]
    assert read_record(first.root).status == "waiting"
    assert population.train(1, 10).results[-1]["step"] == 10  # once more: not a step further
    whole = population.train(1, None)
    never_stopped = population.train(2, None)
    assert shas(whole.root, 30) == shas(never_stopped.root, 30)


def test_weights_and_chains_are_handed_on_as_they_are_and_then_go_their_own_way(population):
    donor = population.train(1, 10)
    other = population.train(2, 10, **{"sgld.step_size": 3.0})
    before = shas(donor.root, 10)
    assert shas(other.root, 10)["chains-00000-of-00001.safetensors"] != before["chains-00000-of-00001.safetensors"]
    assert hold(donor.root, 10) == 10
    point = {"optimizer.learning_rate": 0.001, "sgld.step_size": 1.0}  # the donor's: only the noise differs
    note(other.root, Fork("10-t002", "t001", 10, point))
    other = population.train(2, 20, **{"sgld.step_size": 3.0})  # what Ray Tune says is older than trial.json
    assert shas(other.root, 10) == before
    assert read_record(other.root).science["sgld.step_size"] == 1.0
    assert json.loads((other.root / "trial.json").read())["point"] == point
    donor = population.train(1, 20)
    chains = "chains-00000-of-00001.safetensors"
    assert shas(other.root, 20)[chains] != shas(donor.root, 20)[chains]
    row = next(row for row in read_trials(population.root) if row.name == "t002")
    assert (row.forks, row.point, row.candidate) == (("t001 at step 10",), point, "t002")
    told = [e["why"] for e in events.read(other.root.local / "events.jsonl")[0] if e["kind"] == "attempt"]
    assert told == ["a new run", "from t001 at step 10"]


def test_a_process_that_is_killed_while_it_takes_over_does_so_again(population):
    donor, other = population.train(1, 10), population.train(2, 10)
    hold(donor.root, 10)
    note(other.root, Fork("10-t002", "t001", 10, {"optimizer.learning_rate": 0.002, "sgld.step_size": 1.0}))
    for directory in checkpoint.committed(other.root / "checkpoints"):
        checkpoint.discard(directory)
    (other.root / "checkpoints" / "10" / "model.safetensors").write(b"half of it")
    other = population.train(2, None)
    assert other.results[-1]["status"] == "finished"
    assert [fork.done for fork in read_forks(other.root)] == [True]
    assert shas(other.root, 10)["model.safetensors"] == shas(donor.root, 10)["model.safetensors"]


def test_where_the_donors_checkpoint_is_damaged_the_trial_goes_on_by_itself(population):
    donor, other = population.train(1, 10), population.train(2, 10)
    hold(donor.root, 10)
    (donor.root / HANDED / 10 / "model.safetensors").write(b"damaged")
    note(other.root, Fork("10-t002", "t001", 10, {"optimizer.learning_rate": 0.002, "sgld.step_size": 1.0}))
    other = population.train(2, None)
    assert other.results[-1]["status"] == "finished"
    assert read_record(other.root).science["optimizer.learning_rate"] == 0.001
    notes = [e["text"] for e in events.read(other.root.local / "events.jsonl")[0] if e["kind"] == "note"]
    assert "model.safetensors: has 7 bytes" in notes[0]
    assert checkpoint.read_manifest(donor.root / "checkpoints" / 10).verify() is None  # its own is another file


def test_a_trial_that_is_over_goes_on_from_nobody(population):
    donor, other = population.train(1, 10), population.train(2, None)
    hold(donor.root, 10)
    before = shas(other.root, 30)
    note(other.root, Fork("10-t002", "t001", 10, {"optimizer.learning_rate": 0.002, "sgld.step_size": 1.0}))
    population.train(2, None)
    assert shas(other.root, 30) == before


def rows_at(step, losses, **statuses):
    rows = [
        Row(f"t{i:03}", "search", i, f"t{i:03}" if i else "base", {"sgld.step_size": 1.0 + i}, 0, "waiting", step=step)
        for i in range(len(losses))
    ]
    for row, loss in zip(rows, losses, strict=True):
        row.metrics["val/nll"] = loss
        row.point["optimizer.learning_rate"] = 0.001
    return [row for row in rows if row.name not in statuses]


def test_the_worst_go_on_from_the_best_and_the_base_stays_what_it_is(population):
    for number in range(4):
        population.train(number, 10)
    rows = rows_at(10, [0.9, 0.1, 0.5, 0.4])
    forks = evolve(rows, population.sweep, population.trials, 10)
    assert [(fork.id, fork.donor, fork.step) for fork in forks] == [("10-t002", "t001", 10)]
    assert (population.trials / "t001" / HANDED / 10 / "manifest.json").exists()
    assert evolve(rows, population.sweep, population.trials, 10) == forks  # after a death: the same once more
    assert read_forks(population.trials / "t002") == forks


def test_who_is_elsewhere_or_over_takes_no_part(population):
    for number in range(3):
        population.train(number, 10)
    rows = rows_at(10, [0.2, 0.1, 0.5]) + rows_at(20, [0.01])
    diverged = [Row("t009", "search", 9, "t009", {}, 0, "diverged", step=10, metrics={"val/nll": 7.0})]
    forks = evolve(rows + diverged, population.sweep, population.trials, 10)
    assert [(fork.id, fork.donor) for fork in forks] == [("10-t002", "t001")]


def test_what_is_explored_is_near_the_donors_and_in_the_space(tmp_path):
    text = SWEEP.replace("sgld.steps: 1, ", "")
    text += "  objective.energy_l2: {choice: [0, 0.001, 0.01]}\n  sgld.steps: {int: [1, 4]}\n"
    text += "  sgld.noise_scale: {uniform: [0.01, 0.02], when: {objective.energy_l2: 0.01}}\n"
    sweep = sweep_of(tmp_path, text)
    donor = {
        "optimizer.learning_rate": 0.009,
        "sgld.step_size": 1.0,
        "objective.energy_l2": 0.001,
        "sgld.steps": 4,
    }
    found = [explored(sweep, donor, random.Random(seed)) for seed in range(200)]
    assert all(0.0001 <= point["optimizer.learning_rate"] <= 0.01 for point in found)
    assert {point["objective.energy_l2"] for point in found} == {0, 0.001, 0.01}
    assert {point["sgld.steps"] for point in found} <= {1, 2, 3, 4}
    assert not any("sgld.noise_scale" in point for point in found if point["objective.energy_l2"] != 0.01)
    near = [point["sgld.step_size"] for point in found if point["sgld.step_size"] in (0.8, 1.2)]
    assert 120 <= len(near) <= 175  # three in four: 150, of which a binomial count strays by 6
    assert explored(sweep, donor, random.Random(1)) == explored(sweep, donor, random.Random(1))


def test_what_the_base_has_none_of_is_drawn_and_whole_numbers_move(tmp_path):
    text = SWEEP.replace("sgld.steps: 1, ", "")
    text += "  sgld.clamp: {loguniform: [0.5, 2]}\n  sgld.steps: {int: [1, 4]}\n"
    sweep = sweep_of(tmp_path, text)
    donor = {"optimizer.learning_rate": 0.001, "sgld.step_size": 1.0, "sgld.clamp": None, "sgld.steps": 2}
    found = [explored(sweep, donor, random.Random(seed)) for seed in range(200)]
    assert all(0.5 <= point["sgld.clamp"] <= 2 for point in found)
    steps = [point["sgld.steps"] for point in found]
    assert min(steps.count(1), steps.count(3)) > 50, "two are not two for ever"


def test_a_search_is_one_stretch_but_with_pbt(population, tmp_path):
    assert stretches(population.sweep) == [Stretch("search-10", 10), Stretch("search-20", 20), Stretch("search", None)]
    plain = sweep_of(tmp_path, SWEEP.replace("scheduler: {name: pbt, interval_steps: 10}", ""))
    assert stretches(plain) == [Stretch("search", None)]
