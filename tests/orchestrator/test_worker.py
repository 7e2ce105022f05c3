"""The worker loop as every rank runs it, without Ray: in this process, or in two that gloo connects."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from rank_stories import stories
from spawn import run_ranks
from worker_runs import (
    HOOKED,
    Death,
    Hooks,
    die,
    fit,
    log_of,
    newest,
    poison,
    prepared,
    state_of,
    steps_kept,
    tiny,
    trace,
)

from jem import checkpoint
from jem.config import DataConfig
from jem.data import parquet, stream
from jem.data.augment import to_float
from jem.data.sources import load
from jem.errors import DataError, JEMError
from jem.files import Location
from jem.world import World
from orchestrator import control
from orchestrator.attempt import Attempt
from orchestrator.control import request_stop
from orchestrator.runs import open_record

KINDS = {
    "JEM with averaged and best weights": ("optimizer.ema_decay=0.9", "evaluate.final=best"),
    "SGD and batch norm": ("optimizer.name=sgd", "model.norm=batch"),
    "class-conditional": ("sgld.conditional=true", "objective.p_x_y_weight=1", "objective.p_x_weight=0"),
    "semi-supervised": ("data.labels_per_class=3", "data.labelled_batch_size=5", "data.crop_padding=1"),
    "classifier": ("objective.p_x_weight=0",),
    "bf16": ("precision=bf16",),
    "a Gaussian prior, chains that adapt": (
        *("replay.prior=gaussian", "replay.reinit_prob=0.5", "replay.uniform_share=0.2"),
        *("sgld.max_steps=9", "sgld.final_noise_scale=0"),
    ),
    "a network of one's own with dropout": ("model.options.drop=0.5",),
    "SAM": ("optimizer.sam_rho=0.1", "model.options.drop=0.5", "model.norm=batch"),
    "DAT and the approximate mass": (
        *("sgld.normalize_gradient=true", "objective.p_x_loss=bce", "objective.mass_weight=0.1"),
    ),
    "KL term, p(x) not augmented": ("objective.kl_weight=0.3", "objective.kl_samples=3", "data.augment_p_x=false"),
}


def good_one(folder):
    return checkpoint.newest_good(checkpoint.committed(Location.of(folder) / "checkpoints"))


def look_always(monkeypatch):
    """Every step looks for a request to stop, as a slow step does."""
    monkeypatch.setattr(control, "LOOK_EVERY_S", 0)


def test_checkpoints_are_written_on_time_and_the_newest_stay(tmp_path):
    reported = []
    outcome = fit(
        tmp_path,
        *("steps=14", "checkpoint.every=4", "checkpoint.keep=2", "checkpoint.spaced=0", "recovery.healthy_steps=0"),
        report=lambda _, uri: reported.append(uri),
    )
    assert reported == [f"{tmp_path}/checkpoints/{step}" for step in (0, 4, 8, 12, 14)]
    assert steps_kept(tmp_path) == [8, 12, 14], "two on time, and the last"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["12", "14", "8"]
    assert outcome["status"] == "finished"
    assert (outcome["step"], outcome["checkpoint"]) == (14, f"{tmp_path}/checkpoints/14")


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_bit_for_bit_as_one_that_was_not(tmp_path, kind):
    """Killed before the first checkpoint, between two, right after one, in the last step; SAM in a second pass."""
    settings, each = (HOOKED, *KINDS[kind]), 2 if kind == "SAM" else 1
    whole = fit(tmp_path / "whole", *settings)
    for attempt, passes in enumerate((3, 6, 5, 4), start=1):  # in each attempt
        with pytest.raises(Death):
            fit(tmp_path / "killed", *settings, hooks={each * passes: die}, attempt=attempt)
    pieces = fit(tmp_path / "killed", *settings, attempt=5)
    assert [event["step"] for event in log_of(tmp_path / "killed", "attempt")] == [0, 0, 4, 8, 8]
    assert state_of(tmp_path / "killed") == state_of(tmp_path / "whole")
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")
    for outcome in (whole, pieces):
        outcome["metrics"].pop("train/images_per_s")
        outcome.pop("checkpoint")
    assert pieces == whole


def test_a_killed_run_that_streams_its_images_ends_bit_for_bit_as_one_that_was_not(tmp_path, monkeypatch):
    """Windows of two or three steps: it dies in the third epoch's, before and after a border."""
    monkeypatch.setattr(stream, "WINDOW_BYTES", 200 * 64)
    digits = load(DataConfig(name="digits", validation_size=1237))
    parquet.write(digits, Location.of(tmp_path / "data"), rows_per_group=30, rows_per_file=150)
    assert len(digits.train) == 200
    settings = (HOOKED, "data.name=parquet", f"data.root={tmp_path / 'data'}", "data.stream=true")
    fit(tmp_path / "whole", *settings)
    for attempt, passes in enumerate((6, 5), start=1):
        with pytest.raises(Death):
            fit(tmp_path / "killed", *settings, hooks={passes: die}, attempt=attempt)
    fit(tmp_path / "killed", *settings, attempt=3)
    assert state_of(tmp_path / "killed") == state_of(tmp_path / "whole")
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")
    tags = log_of(tmp_path / "killed", "tags")[0]["tags"]
    assert (tags["data.train"], tags["data.digest"]) == ("200", digits.digest)


@pytest.mark.parametrize("step", [1, 6, 8, 11])
def test_a_request_to_stop_gives_a_checkpoint_at_once_and_the_rest_follows_exactly(tmp_path, monkeypatch, step):
    look_always(monkeypatch)
    settings = (HOOKED, "optimizer.ema_decay=0.9")
    root = Location.of(tmp_path / "stopped")
    outcome = fit(tmp_path / "stopped", *settings, hooks={step: lambda _: request_stop(root)})
    assert (outcome["status"], outcome["step"]) == ("stopped", step)
    assert outcome["checkpoint"] == f"{root.uri}/checkpoints/{step}"
    assert steps_kept(tmp_path / "stopped")[-1] == step
    control.clear_request(root)
    assert fit(tmp_path / "stopped", *settings)["status"] == "finished"
    fit(tmp_path / "whole", *settings)
    assert state_of(tmp_path / "stopped") == state_of(tmp_path / "whole")
    assert trace(tmp_path / "stopped") == trace(tmp_path / "whole")


def test_a_request_in_the_last_step_does_not_keep_a_run_from_finishing(tmp_path, monkeypatch):
    look_always(monkeypatch)
    root = Location.of(tmp_path)
    assert fit(tmp_path, HOOKED, hooks={12: lambda _: request_stop(root)})["status"] == "finished"


def test_more_steps_go_on_as_if_they_had_been_asked_for_at_once(tmp_path):
    fit(tmp_path / "more", "steps=7")
    assert fit(tmp_path / "more", "steps=12")["step"] == 12
    fit(tmp_path / "once", "steps=12")
    assert state_of(tmp_path / "more") == state_of(tmp_path / "once")


def test_a_run_that_is_done_is_not_trained_again_and_has_its_metrics(tmp_path):
    done = fit(tmp_path)
    state = state_of(tmp_path)
    assert fit(tmp_path, attempt=2) == done
    assert state_of(tmp_path) == state
    since = log_of(tmp_path)[log_of(tmp_path).index(log_of(tmp_path, "attempt")[-1]) :]
    assert not [event for event in since if event["kind"] in ("metrics", "checkpoint", "image")]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit in the weights": lambda d: flip(d / "model.safetensors"),
    "a flipped bit in the chains": lambda d: flip(d / "chains-00000-of-00001.safetensors"),
    "a moment cut short": lambda d: (d / "optimizer.safetensors").write_bytes(b"1234"),
    "a missing generator": lambda d: (d / "rank-00000-of-00001.safetensors").unlink(),
    "no manifest": lambda d: (d / "manifest.json").unlink(),
    "half a manifest": lambda d: (d / "manifest.json").write_text('{"schema": 1, "st'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    fit(tmp_path)
    whole = state_of(tmp_path)
    DAMAGE[damage](tmp_path / "checkpoints" / "12")
    assert fit(tmp_path, attempt=2)["status"] == "finished"
    assert log_of(tmp_path, "attempt")[-1]["step"] == 8
    assert state_of(tmp_path) == whole


def test_a_run_whose_run_json_was_lost_goes_on_as_the_attempt_after_the_last_one(tmp_path):
    fit(tmp_path, "steps=4", attempt=3)
    settings, root = tiny("steps=8"), Location.of(tmp_path)
    first = Attempt(settings, root, open_record(root, settings, fresh=False))
    assert first.number == 4
    first.begin()
    assert fit(tmp_path, "steps=8", attempt=first.number)["status"] == "finished"
    assert Attempt(settings, root, open_record(root, settings, fresh=False)).number == 5


def test_without_any_good_checkpoint_the_run_does_not_start_anew_by_itself(tmp_path):
    fit(tmp_path)
    for step in (0, 4, 8, 12):
        flip(tmp_path / "checkpoints" / str(step) / "model.safetensors")
    before = len(log_of(tmp_path))
    outcome = fit(tmp_path)
    assert (outcome["status"], outcome["exit_code"]) == ("no good checkpoint", 3)
    assert outcome["message"].count("SHA-256 differs") == 4
    assert "--fresh" in outcome["message"]
    assert len(log_of(tmp_path)) == before, "it trained"


def test_a_classifier_runs_no_chains(tmp_path, monkeypatch):
    def never(*_arguments, **_named):
        raise AssertionError("a chain was run")

    monkeypatch.setattr("jem.train.sgld_chain", never)
    outcome = fit(tmp_path, "tracking.images_every=3", recipe="digits_classifier")
    assert outcome["status"] == "finished"
    assert not [name for name in newest(tmp_path).files if "chains" in name]
    assert log_of(tmp_path, "image") == []
    named = set(outcome["metrics"])
    assert {"train/cross_entropy", "train/energy_data", "val/accuracy"} <= named
    assert not named & {"train/energy_samples", "train/energy_gap", "train/chain_grad_norm", "train/reinit_share"}


def test_the_first_point_is_that_of_the_first_batch_by_hand(tmp_path):
    settings = ("steps=1", "tracking.every=1")
    training = prepared(tmp_path / "by hand", *settings)
    batch = training.batches.at(0)
    with torch.no_grad():
        logits = training.state.network(batch.images)
    outcome = fit(tmp_path / "run", *settings)
    metrics = outcome["metrics"]
    assert metrics["train/cross_entropy"] == pytest.approx(F.cross_entropy(logits, batch.labels).item(), abs=1e-5)
    assert metrics["train/energy_data"] == pytest.approx(-logits.logsumexp(1).mean().item(), abs=1e-5)
    assert metrics["train/accuracy"] == pytest.approx((logits.argmax(1) == batch.labels).double().mean().item())
    gap = metrics["train/energy_data"] - metrics["train/energy_samples"]
    assert metrics["train/energy_gap"] == pytest.approx(gap, abs=1e-12)
    assert metrics["train/loss"] == pytest.approx(metrics["train/cross_entropy"] + gap, abs=1e-5)
    assert metrics["train/learning_rate"] == pytest.approx(0.01 / 2)
    assert metrics["train/reinit_share"] * 8 == round(metrics["train/reinit_share"] * 8)


def test_a_point_averages_the_steps_since_the_one_before(tmp_path):
    fit(tmp_path / "1", "tracking.every=1")
    fit(tmp_path / "4", "tracking.every=4")
    fine, coarse = trace(tmp_path / "1"), trace(tmp_path / "4")
    assert {step for key, step in coarse if key == "train/loss"} == {4, 8, 12}
    for key in ("train/loss", "train/accuracy", "train/energy_samples", "train/chain_grad_norm"):
        for end in (4, 8, 12):
            mean = sum(fine[key, step] for step in range(end - 3, end + 1)) / 4
            assert coarse[key, end] == pytest.approx(mean, rel=1e-9)


def test_validation_is_measured_on_time_and_pictures_are_drawn_on_time(tmp_path):
    fit(tmp_path, "evaluate.every=5", "tracking.images_every=6")
    assert [step for key, step in trace(tmp_path) if key == "val/nll"] == [5, 10, 12]
    images = log_of(tmp_path, "image")
    assert [(e["key"], e["step"]) for e in images] == [("samples", 6), ("samples", 12)]
    with Image.open(tmp_path / images[-1]["path"]) as picture:
        assert picture.size == (10 * 50 - 2, 10 * 50 - 2)  # 8x8 digits, enlarged to 48x48, with gaps of 2


def test_a_picture_of_conditional_chains_has_a_row_for_each_class(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("orchestrator.training.grid_png", lambda images, **_: seen.append(images) or b"")
    settings = ("sgld.conditional=true", "replay.capacity=100", "tracking.images_every=12")
    fit(tmp_path, *settings)
    chains = checkpoint.read_chains(newest(tmp_path), prepared(tmp_path, *settings).world, 100).chains
    grid = seen[0].unflatten(0, (10, 10))
    for label in range(10):
        assert torch.equal(grid[label], chains[label::10])


def accuracy(tmp_path, settings, tensors, split="test"):
    training = prepared(tmp_path / "again", *settings)
    network, data = training.state.network, getattr(training.data, split)
    network.load_state_dict(tensors)
    with torch.no_grad():
        logits = network.eval()(to_float(data.images, torch.float32))
    return (logits.argmax(1) == data.labels).double().mean().item()


def test_best_weights_are_those_of_the_best_validation(tmp_path):
    def spoil(network):
        with torch.no_grad():
            for p in network.parameters():
                p.neg_()

    settings = (HOOKED, "evaluate.final=best", "evaluate.every=2", "evaluate.suite=fast", "objective.p_x_weight=0")
    outcome = fit(tmp_path, *settings, "steps=40", hooks={37: spoil})
    manifest, validated = newest(tmp_path), {s: v for (k, s), v in trace(tmp_path).items() if k == "val/accuracy"}
    assert outcome["weights"] == manifest.info["final"] == "best"
    assert manifest.info["best"]["accuracy"] == max(validated.values()) > validated[40]
    assert validated[manifest.info["best"]["step"]] == max(validated.values())
    best = accuracy(tmp_path, settings, manifest.tensors("best.safetensors"))
    last = accuracy(tmp_path, settings, manifest.tensors("model.safetensors"))
    assert outcome["metrics"]["test/accuracy"] == pytest.approx(best)
    assert outcome["metrics"]["val/accuracy"] == manifest.info["metrics"]["val/accuracy"] == max(validated.values())
    assert best != last
    assert outcome["step"] == 40


def test_the_averaged_weights_are_evaluated_where_the_setting_says_so(tmp_path):
    settings = ("optimizer.ema_decay=0.9", "evaluate.ema=true", "evaluate.suite=fast")
    outcome = fit(tmp_path, *settings, "steps=30")
    manifest = newest(tmp_path)
    assert outcome["weights"] == manifest.info["final"] == "ema"
    average = accuracy(tmp_path, settings, manifest.tensors("ema.safetensors"))
    assert outcome["metrics"]["test/accuracy"] == pytest.approx(average)
    assert average != accuracy(tmp_path, settings, manifest.tensors("model.safetensors"))
    validation = accuracy(tmp_path, settings, manifest.tensors("ema.safetensors"), "validation")
    assert outcome["metrics"]["val/accuracy"] == pytest.approx(validation)


def test_the_last_evaluation_has_all_figures_of_the_fast_suite(tmp_path):
    metrics = fit(tmp_path, "evaluate.suite=fast")["metrics"]
    wanted = {f"ood/{s}/{k}/auroc" for s in ("interp", "uniform") for k in ("log_px", "max_py", "approx_mass")}
    wanted |= {f"{split}/{k}" for split in ("val", "test") for k in ("accuracy", "nll", "ece")}
    wanted |= {
        f"train/{k}"
        for k in (
            *("loss", "cross_entropy", "energy_data", "energy_samples", "energy_gap", "chain_grad_norm"),
            *("reinit_share", "accuracy", "images_per_s", "learning_rate"),
        )
    }
    assert wanted <= set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    assert not [key for key in fit(tmp_path / "none", "evaluate.suite=none")["metrics"] if key.startswith("test/")]


def test_an_evaluation_that_cannot_be_made_leaves_a_finished_run_with_its_model(tmp_path):
    outcome = fit(tmp_path, "steps=4", "evaluate.suite=full", "evaluate.sets=[/nowhere]", "evaluate.register=true")
    assert (outcome["status"], outcome["step"]) == ("finished", 4)
    assert outcome["calibrated"] is not None
    assert outcome["message"].startswith("trained to the end, but not evaluated: ")
    assert "/nowhere" in outcome["message"]
    assert outcome["message"].endswith(
        f"python jobs/evaluate.py {tmp_path} evaluate.suite=full 'evaluate.sets=[/nowhere]'"
    )
    assert [event["text"] for event in log_of(tmp_path, "note")] == [outcome["message"]]


def test_whatever_ends_an_evaluation_the_run_has_been_trained(tmp_path, monkeypatch):
    def broken(*_):
        raise MemoryError("too many images\nand a long story")

    monkeypatch.setattr("orchestrator.training.evaluate", broken)
    outcome = fit(tmp_path, "steps=4", "evaluate.suite=fast", "evaluate.register=true")
    assert (outcome["status"], outcome["calibrated"] is None) == ("finished", False)
    assert "not evaluated: MemoryError: too many images; python jobs/evaluate.py" in outcome["message"]


def test_a_run_whose_every_update_is_not_finite_ends_diverged_and_leaves_good_checkpoints(tmp_path):
    settings = (HOOKED, "recovery.every=3", "recovery.max=0", "recovery.healthy_steps=0")
    outcome = fit(tmp_path, *settings, hooks={6: poison})
    assert (outcome["status"], outcome["exit_code"]) == ("diverged", 4)
    assert "3 of 3 updates were not finite" in outcome["message"]
    assert "recovery.max=0" in outcome["message"]
    manifest, faults = good_one(tmp_path)
    assert (manifest.step, faults) == (8, [])
    assert outcome["checkpoint"] == f"{tmp_path}/checkpoints/8"
    for name in manifest.files:
        if name.endswith(".safetensors"):
            assert all(t.double().isfinite().all() for t in manifest.tensors(name).values()), name
    assert fit(tmp_path, HOOKED, attempt=2)["status"] == "finished"


def test_one_update_that_is_not_finite_is_skipped_and_counted(tmp_path):
    def poison_once(_network):
        def output(out):
            Hooks.output = staticmethod(lambda out: out)
            return out * math.nan

        Hooks.output = staticmethod(output)

    outcome = fit(tmp_path, HOOKED, "tracking.every=3", hooks={5: poison_once})
    assert outcome["status"] == "finished", outcome["message"]
    skipped = {step: v for (key, step), v in trace(tmp_path).items() if key == "train/skipped_updates"}
    assert skipped == {3: 0, 6: 1, 9: 0, 12: 0}
    assert all(math.isfinite(value) for value in trace(tmp_path).values())


def test_a_data_set_and_a_network_of_ones_own_are_trained_on(tmp_path):
    settings = (HOOKED, "data.name=worker_runs:bars", "data.options.images=80", "data.noise_std=0")
    outcome = fit(tmp_path, *settings, "steps=40", "evaluate.suite=fast", "replay.capacity=8")
    assert outcome["metrics"]["test/accuracy"] == 1.0
    assert newest(tmp_path).info["classes"] == ["left", "right"]
    assert newest(tmp_path).info["image_shape"] == [1, 6, 6]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.name=worker_runs:absent", "model.name: is 'worker_runs:absent', but worker_runs has no 'absent'"),
        ("data.name=no_such_module:f", "there is no module 'no_such_module'; is it on PYTHONPATH"),
    ],
)
def test_a_function_that_is_not_there_is_a_bad_configuration(tmp_path, setting, said):
    outcome = fit(tmp_path, setting)
    assert (outcome["status"], outcome["exit_code"]) == ("bad configuration", 2)
    assert said in outcome["message"]


def test_act_norm_starts_from_the_first_batch_once(tmp_path):
    """Every activation has mean 0 and variance 1 at the start, and a run that goes on keeps what it learnt."""
    fit(tmp_path, "model.norm=act", "steps=4")
    kept = newest(tmp_path).tensors("model.safetensors")
    training = prepared(tmp_path, "model.norm=act")
    assert all(torch.equal(kept[k], v) for k, v in training.state.network.state_dict().items())
    fresh = prepared(tmp_path / "fresh", "model.norm=act")
    with torch.no_grad():
        first = fresh.state.network[:2](fresh.batches.at(0).images)
    assert first.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (first.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3


# Two ranks: what rank_stories.py has them do.


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """(folder, what each of two ranks has to tell); see rank_stories.py."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(stories, (2,), folder / "meet", str(folder))[2]


def same(told, story, key):
    assert told[0][story][key] == told[1][story][key]
    return told[0][story][key]


def test_two_ranks_that_are_killed_end_bit_for_bit_as_two_that_are_not(two_ranks):
    folder, _ = two_ranks
    assert [event["step"] for event in log_of(folder / "killed", "attempt")] == [0, 0, 4]
    assert state_of(folder / "killed") == state_of(folder / "whole")
    assert trace(folder / "killed") == trace(folder / "whole")
    assert {"chains-00000-of-00002.safetensors", "chains-00001-of-00002.safetensors"} <= set(state_of(folder / "whole"))


def test_two_ranks_stop_at_the_same_step_and_go_on_exactly(two_ranks):
    folder, told = two_ranks
    assert same(told, "stopped", "status") == "stopped"
    assert same(told, "stopped", "step") == 6
    assert same(told, "gone on", "status") == "finished"
    assert state_of(folder / "stopped") == state_of(folder / "whole")
    assert trace(folder / "stopped") == trace(folder / "whole")


def test_every_rank_reports_every_checkpoint_and_returns_the_same(two_ranks):
    folder, told = two_ranks
    for rank in told:
        assert [Path(uri).name for _, uri in rank["reports"]] == ["0", "4", "8", "12"]
    metrics = [{k: v for k, v in rank["whole"]["metrics"].items() if k != "train/images_per_s"} for rank in told]
    assert metrics[0] == metrics[1]
    assert same(told, "whole", "checkpoint") == f"{folder}/whole/checkpoints/12"


def test_metrics_are_those_of_the_whole_batch_whatever_the_number_of_ranks(two_ranks, tmp_path):
    folder, told = two_ranks
    alone = fit(tmp_path, "precision=float64", "evaluate.suite=fast", recipe="digits_classifier")["metrics"]
    for rank in told:
        shared = rank["classifier"]["metrics"]
        assert shared.keys() == alone.keys()
        for key in alone.keys() - {"train/images_per_s"}:
            assert shared[key] == pytest.approx(alone[key], rel=1e-9, abs=1e-9), key
    one, two = trace(tmp_path), trace(folder / "classifier")
    assert one.keys() == two.keys()
    assert all(two[key] == pytest.approx(one[key], rel=1e-9, abs=1e-9) for key in one)


@pytest.mark.parametrize(
    ("story", "message"),
    [("no data", "the disk of rank 1 has no images"), ("no network", "rank 1 cannot make the network")],
)
def test_an_error_of_one_rank_is_the_same_clear_error_on_all(two_ranks, story, message):
    _, told = two_ranks
    assert same(told, story, "status") == "bad data"
    assert same(told, story, "message") == message


def test_images_that_one_rank_cannot_read_end_its_process_and_so_all(tmp_path):
    """Returned as the run's status, they would leave the other ranks waiting for its gradients."""

    def unreadable(_step):
        raise DataError("train-00003.parquet: row group 7 is damaged")

    training = prepared(tmp_path)
    training.batches.at = unreadable
    with pytest.raises(DataError):
        training.batch_at(3)
    training.world = World(1, 2)
    with pytest.raises(RuntimeError, match="row group 7") as raised:
        training.batch_at(3)
    assert not isinstance(raised.value, JEMError)


def test_what_is_not_finite_on_one_rank_ends_the_run_on_all(two_ranks):
    folder, told = two_ranks
    assert same(told, "diverged", "status") == "diverged"
    assert same(told, "diverged", "exit_code") == 4
    manifest, faults = good_one(folder / "diverged")
    assert (manifest.step, faults) == (8, [])


def test_a_picture_is_a_png_that_holds_the_chains(tmp_path):
    fit(tmp_path, "steps=1", "sgld.noise_scale=0")
    data = (tmp_path / "samples" / "00000001.png").read_bytes()
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert pixels.shape == (498, 498, 3)
    assert pixels.std() > 10


def test_two_ranks_that_start_from_a_checkpoint_take_its_weights_and_share_its_chains(two_ranks):
    folder, told = two_ranks
    (weights_0, chains_0), (weights_1, chains_1) = (rank["taken"] for rank in told)
    manifest = newest(folder / "whole")
    best = manifest.tensors("best.safetensors")
    assert best.keys() == weights_0.keys() == weights_1.keys()
    assert all(torch.equal(weights_0[k], v) and torch.equal(weights_1[k], v) for k, v in best.items())
    assert torch.equal(torch.cat([chains_0, chains_1]), checkpoint.read_chains(manifest, World(), 25).chains)


def test_ranks_stop_at_the_same_step_though_only_rank_0_sees_the_request(two_ranks):
    steps = [rank["asked"] for rank in two_ranks[1]]
    assert steps[0] == steps[1] >= 20


def test_a_damaged_newer_checkpoint_does_not_push_out_the_good_one_just_written(tmp_path):
    fit(tmp_path, "checkpoint.keep=1", "steps=8")
    fit(tmp_path, "checkpoint.keep=2", "steps=12")
    (tmp_path / "checkpoints" / "12" / "model.safetensors").write_bytes(b"")
    few = ("checkpoint.keep=1", "checkpoint.spaced=0", "recovery.healthy_steps=0")
    outcome = fit(tmp_path, *few, "steps=10", attempt=3)
    assert outcome["step"] == 10
    manifest, faults = good_one(tmp_path)
    assert (manifest.step, faults) == (10, [])
    assert [d.name for d in (Location.of(tmp_path) / "checkpoints").children()] == ["10", "8"]


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    settings = ("data.name=worker_runs:growing", f"data.options.count={tmp_path}/count")
    (tmp_path / "count").write_text("40")
    assert fit(tmp_path, *settings, "steps=4")["status"] == "finished"
    assert fit(tmp_path, *settings, "steps=6")["step"] == 6
    (tmp_path / "count").write_text("41")
    outcome = fit(tmp_path, *settings)
    assert (outcome["status"], outcome["exit_code"]) == ("bad data", 2)
    assert "not those the run began with" in outcome["message"]


def test_tied_weights_are_saved(tmp_path):
    assert fit(tmp_path, "model.name=worker_runs:tied", "steps=4")["status"] == "finished"


@pytest.mark.parametrize("every", [1, 12])
def test_one_skipped_update_is_no_divergence_whatever_is_logged_how_often(tmp_path, every):
    def poison_once(_network):
        def output(out):
            Hooks.output = staticmethod(lambda out: out)
            return out * math.nan

        Hooks.output = staticmethod(output)

    outcome = fit(tmp_path, HOOKED, f"tracking.every={every}", "steps=12", hooks={12: poison_once})
    assert (outcome["status"], outcome["step"]) == ("finished", 12)


def test_two_ranks_that_diverge_roll_back_together_and_killed_in_between_end_with_the_same_bits(two_ranks):
    folder, told = two_ranks
    for story in ("unstable", "unstable killed"):
        assert same(told, story, "status") == "finished"
        assert same(told, story, "checkpoint") == f"{folder}/{story}/checkpoints/60"
    assert log_of(folder / "unstable", "rollback"), "these settings do not diverge any more"
    assert newest(folder / "unstable").info["rollbacks"] == len(log_of(folder / "unstable", "rollback"))
    assert state_of(folder / "unstable") == state_of(folder / "unstable killed")


def test_a_rank_that_cannot_read_what_a_rollback_goes_back_to_ends_the_run_on_all(two_ranks):
    _, told = two_ranks
    assert same(told, "unreadable", "status") == "no good checkpoint"
    assert same(told, "unreadable", "exit_code") == 3
    assert "rank 1 cannot read it" in same(told, "unreadable", "message")
