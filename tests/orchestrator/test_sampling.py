"""Images drawn from trained models: which chains, how far, and what is written of them."""

import json
import shutil

import numpy as np
import pytest
import torch
from made_models import portable
from PIL import Image, ImageSequence
from worker_runs import fit, newest, prepared, tiny

from jem.checkpoint import read_chains
from jem.energy import energy_fn
from jem.errors import CheckpointError, ConfigError, DivergedError
from jem.files import Location
from jem.predict import Predictor, read_card, read_weights, save
from jem.prior import draw_gaussian
from jem.randomness import generator as stream
from jem.sgld import sgld_chain
from jem.world import World
from orchestrator import sample_files, sampling
from orchestrator.final_model import write_model
from orchestrator.opened import open_model
from orchestrator.pictures import grid, grid_png
from orchestrator.runs import RunRecord, write_config

BUFFER = 120
LEARNT = ("steps=60", "replay.capacity=120", "checkpoint.every=60", "sgld.steps=4")
"""Long enough for a class to have an energy of its own."""


def trained(storage, name, *settings):
    """A finished run, as its driver leaves it, and its portable model."""
    root, settings = storage / name, ("evaluate.register=true", f"name={name}", *LEARNT, *settings)
    outcome, config = fit(root, *settings), tiny(*settings)
    RunRecord(name, config.science, config.digest, "finished").save(Location.of(root))
    write_config(Location.of(root), config)
    event = write_model(root, config, outcome, {"name": name})
    return root, root / event["path"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("storage"), "one")


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("storage"), "two", "sgld.conditional=true")[0]


@pytest.fixture
def drawn(made, tmp_path):
    """(Result, images [n, h, w, c], samples.json) of the run with these settings."""

    def draw(*settings, model=made[0], name="out"):
        result = sampling.sample(str(model), [f"out={tmp_path / name}", *settings])
        folder = tmp_path / name
        return result, np.load(folder / "samples.npy"), json.loads((folder / "samples.json").read_text())

    return draw


def as_pixels(x):
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def chains_of(root):
    return read_chains(newest(root), World(), BUFFER).positions(torch.float32)


# which chains


def test_fresh_chains_are_those_of_the_models_sgld_from_its_prior(drawn, made):
    _, images, _ = drawn("count=5", "steps=3", "seed=7")
    opened, noise = open_model(str(made[0])), stream("cpu", "sample", 7, 0)
    x = torch.rand(100, 1, 8, 8, generator=noise) * 2 - 1
    config = sampling.replace(opened.config.sgld, steps=3)
    assert (config.step_size, config.noise_scale) == (1.0, 0.01)
    x, _ = sgld_chain(energy_fn(opened.network()), x, config, noise)
    np.testing.assert_array_equal(images, as_pixels(x[:5]))


@pytest.mark.parametrize("prior", ["gaussian", "data"])
def test_chains_of_a_fitted_prior_start_at_its_gaussian_whatever_is_opened(drawn, tmp_path, prior):
    settings = (f"replay.prior={prior}", "steps=4", "checkpoint.every=4", "replay.uniform_share=0")
    root, folder = trained(tmp_path / "storage", "three", *settings)
    _, images, said = drawn("count=40", "steps=0", "class=1", model=root)
    again = drawn("count=40", "steps=0", "class=1", model=folder)[1]
    np.testing.assert_array_equal(images, again)
    assert said["settings"]["prior"] == prior
    state = prepared(root, *settings, *LEARNT[1:], "name=three").state
    gaussian = state.replay.prior.gaussian
    noise = stream("cpu", "sample", 0, 0)
    x = draw_gaussian(gaussian, torch.ones(100, dtype=torch.int64), noise)[:40].view(40, 1, 8, 8)
    np.testing.assert_array_equal(images, as_pixels(x))
    bare = tmp_path / "bare"
    save(bare, read_card(folder), read_weights(folder))
    with pytest.raises(CheckpointError, match=rf"holds no statistics of replay\.prior={prior}"):
        drawn("count=4", "steps=0", model=bare)


def test_a_typed_step_size_is_that_of_every_step_of_a_model_with_a_schedule(drawn, tmp_path):
    root, _ = trained(tmp_path / "storage", "four", "sgld.final_step_size=0.1", "steps=4", "checkpoint.every=4")
    for typed, expected in (((), (1.0, 0.1)), (("sgld.step_size=0.5",), (0.5, None))):
        sgld = drawn("count=2", "steps=1", *typed, model=root)[2]["settings"]["sgld"]
        assert (sgld["step_size"], sgld["final_step_size"]) == expected


def test_steps_0_is_the_prior_itself(drawn, made, monkeypatch):
    result, images, said = drawn("count=3", "steps=0")
    x = torch.rand(100, 1, 8, 8, generator=stream("cpu", "sample", 0, 0)) * 2 - 1
    np.testing.assert_array_equal(images, as_pixels(x[:3]))
    assert "chain.gif" not in result.files
    assert said["film"] is None
    monkeypatch.setattr("jem.prior.uniform", lambda shape, _: torch.full(shape, 0.5))
    assert (drawn("count=3", "steps=0")[1] == 191).all(), "further priors are the model's own"


def test_the_same_seed_gives_the_same_bits_and_another_others(drawn, tmp_path):
    drawn("count=4", "steps=5", name="a")
    drawn("count=4", "steps=5", name="b")
    for name in sampling.FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    first, other = drawn("count=4", "steps=5")[1], drawn("count=4", "steps=5", "seed=1")[1]
    assert (first != other).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("settings", [("steps=3",), ("steps=3", "class=all"), ("steps=3", "init=buffer")])
def test_the_count_does_not_change_the_first_images(drawn, settings):
    few, many = drawn("count=10", *settings)[1], drawn("count=110", *settings)[1]
    np.testing.assert_array_equal(few, many[:10])
    assert len(np.unique(many.reshape(110, -1), axis=0)) == 110, "batches have noise of their own"


def test_steps_default_to_the_mean_life_of_a_training_chain():
    assert sample_files.default_steps(tiny("sgld.steps=3", "replay.reinit_prob=0.04")) == 75
    assert sample_files.default_steps(tiny("sgld.steps=3", "replay.reinit_prob=0")) == 60


def test_step_size_and_noise_are_the_commands_where_it_says_so(drawn):
    _, at_rest, said = drawn("count=3", "steps=2", "sgld.step_size=1e-9", "sgld.noise_scale=0")
    np.testing.assert_array_equal(at_rest, drawn("count=3", "steps=0")[1])
    assert (said["settings"]["sgld"]["step_size"], said["settings"]["sgld"]["noise_scale"]) == (1e-9, 0)


# classes


def test_a_class_raises_its_own_probability(drawn):
    settings = ("count=100", "steps=80")
    without, free = drawn(*settings)[1:]
    result, images, said = drawn(*settings, "class=3")
    assert result.metrics["class_probability"] == said["class_probability"]
    assert said["class_probability"] > 2 * free["predicted"]["3"] / 100
    assert result.predicted["3"] > free["predicted"]["3"]
    assert said["labels"] == [3] * 100
    assert (images != without).any()


def test_all_draws_every_class_in_turn_and_the_grid_has_a_row_a_class(drawn, tmp_path):
    result, images, said = drawn("count=15", "steps=4", "class=all")
    assert (result.count, len(images)) == (20, 20)
    assert "count=15 was rounded up to 20, a multiple of the 10 classes" in result.message
    assert said["labels"] == [*range(10), *range(10)]
    np.testing.assert_array_equal(images[4], drawn("count=5", "steps=4", "class=4", name="four")[1][4])
    shown = np.asarray(Image.open(tmp_path / "out" / "grid.png"))
    assert shown.shape == (10 * 50 - 2, 2 * 50 - 2, 3)
    drawn("count=20", "steps=0", "class=all")
    shown, plain = np.asarray(Image.open(tmp_path / "out" / "grid.png")), np.load(tmp_path / "out" / "samples.npy")
    for row, column in ((0, 0), (3, 0), (7, 1)):
        x = torch.from_numpy(plain[row + 10 * column]).permute(2, 0, 1)[None] / 127.5 - 1
        cell = shown[row * 50 : row * 50 + 48, column * 50 : column * 50 + 48].astype(int)
        assert np.abs(cell - grid(x, 1)).max() <= 4, "but for the rounding of samples.npy"


def test_the_grid_is_of_the_first_hundred_in_rows_of_ten(drawn, tmp_path, made):
    drawn("count=110", "steps=0", "init=buffer")
    order = torch.randperm(BUFFER, generator=stream("cpu", "sample", 0, "buffer"))
    assert (tmp_path / "out" / "grid.png").read_bytes() == grid_png(chains_of(made[0])[order[:100]], 10)


# the replay buffer


def test_chains_of_the_buffer_are_the_checkpoints_each_once(drawn, made):
    result, images, said = drawn(f"count={BUFFER}", "init=buffer")
    assert (result.steps, said["settings"]["init"]) == (0, "buffer")
    order = torch.randperm(BUFFER, generator=stream("cpu", "sample", 0, "buffer"))
    np.testing.assert_array_equal(images, as_pixels(chains_of(made[0])[order]))
    assert sorted(order.tolist()) == list(range(BUFFER))


def test_a_conditional_runs_chains_keep_their_class(drawn, conditional):
    result, images, _ = drawn("count=12", "init=buffer", "class=4", model=conditional)
    of_class = as_pixels(chains_of(conditional)[4::10])
    assert result.message == ""
    assert sorted(image.tobytes() for image in images) == sorted(image.tobytes() for image in of_class)
    with pytest.raises(ConfigError, match="count: is 13, 13 of a class; of the buffer's 120 chains 12 are of class 4"):
        drawn("count=13", "init=buffer", "class=4", model=conditional)
    everything = drawn("count=120", "init=buffer", "class=all", model=conditional)[1]
    for c in range(10):
        own = sorted(image.tobytes() for image in as_pixels(chains_of(conditional)[c::10]))
        assert sorted(image.tobytes() for image in everything[c::10]) == own


def test_chains_without_a_class_are_chosen_by_the_models_answer(drawn, made):
    predicted = drawn(f"count={BUFFER}", "init=buffer")[2]["predicted"]
    name, n = max(predicted.items(), key=lambda item: item[1])
    result, _, said = drawn(f"count={n}", "init=buffer", f"class={name}")
    assert "chosen by the model's own answer" in result.message
    assert said["predicted"][name] == n
    with pytest.raises(ConfigError, match=rf"chains {n} are of class {name}; ask for fewer, or init=fresh"):
        drawn(f"count={n + 1}", "init=buffer", f"class={name}")


def test_a_model_without_chains_is_told_where_they_are(drawn, made, tmp_path):
    root, folder = made
    with pytest.raises(ConfigError, match=rf"init: is buffer, but .* no chains; give the run's folder .*{root}"):
        drawn("init=buffer", model=folder)
    portable(tmp_path / "alone")
    with pytest.raises(ConfigError, match="weights alone, no chains; give the run's folder"):
        drawn("init=buffer", model=tmp_path / "alone")


def test_a_run_and_its_portable_model_give_the_same_images(drawn, made):
    root, folder = made
    settings = ("count=4", "steps=3", "class=2")
    np.testing.assert_array_equal(drawn(*settings, model=root)[1], drawn(*settings, model=folder)[1])


# what is written


def test_the_figures_are_the_models_of_the_saved_images(drawn, made):
    result, images, said = drawn("count=20", "steps=5", "class=1")
    predictor = Predictor.load(made[1])
    assert (images.dtype, images.shape) == (np.uint8, (20, 8, 8, 1))
    found = predictor(images)
    assert -said["energy"]["mean"] == pytest.approx(found.log_density.mean(), abs=1e-5)
    assert said["energy"]["max"] == pytest.approx(-found.log_density.min(), abs=1e-5)
    p = predictor.logits(images).double().softmax(dim=1).numpy()
    assert said["confidence"] == pytest.approx(p.max(axis=1).mean(), abs=1e-6)
    assert said["class_probability"] == pytest.approx(p[:, 1].mean(), abs=1e-6)
    assert list(said["predicted"].values()) == np.bincount(found.index, minlength=10).tolist()
    assert result.metrics == {
        "confidence": said["confidence"],
        "energy": said["energy"]["mean"],
        "saturation": said["saturation"],
        "class_probability": said["class_probability"],
    }


def test_saturation_is_the_share_of_pixels_beyond_twice_the_data(drawn, monkeypatch):
    monkeypatch.setattr("jem.prior.uniform", lambda shape, _: torch.arange(64.0).reshape(1, 1, 8, 8).expand(shape) / 31)
    result, *_ = drawn("count=2", "steps=0")
    assert result.metrics["saturation"] == 2 / 64
    assert result.message == ""
    monkeypatch.setattr("jem.prior.uniform", lambda shape, _: torch.full(shape, 2.0))
    assert "100 % of the pixels are saturated" in drawn("count=2", "steps=0")[0].message


def test_the_animation_has_its_frames_and_ends_where_the_chains_do(drawn, tmp_path, monkeypatch):
    ends = []
    monkeypatch.setattr(sample_files, "grid_png", lambda x, columns: ends.append(x) or grid_png(x, columns))
    drawn("count=30", "steps=50", "frames=12", "sgld.noise_scale=0.1")
    with Image.open(tmp_path / "out" / "chain.gif") as film:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]
        assert (len(frames), film.info["loop"], film.info["duration"]) == (12, 0, 2000)
    start = torch.rand(100, 1, 8, 8, generator=stream("cpu", "sample", 0, 0)) * 2 - 1
    np.testing.assert_array_equal(frames[0], grid(start[:25], 5))
    np.testing.assert_array_equal(frames[-1], grid(ends[0][:25], 5))


@pytest.mark.parametrize(("steps", "frames"), [(1, 40), (39, 40), (40, 40), (50, 12), (200, 40), (100_000, 40)])
def test_frames_are_denser_at_the_start_and_none_is_there_twice(steps, frames):
    found = sample_files.marks(steps, frames)
    assert (found[0], found[-1], len(found)) == (0, steps, min(frames, steps + 1))
    gaps = np.diff(found)
    assert (gaps >= 1).all()
    assert gaps[-1] == max(gaps)


def test_coloured_chains_become_an_animation_too(tmp_path):
    portable(tmp_path / "model")
    settings = [f"out={tmp_path / 'out'}", "count=6", "steps=4", "class=dog"]
    result = sampling.sample(str(tmp_path / "model"), settings)
    assert np.load(tmp_path / "out" / "samples.npy").shape == (6, 4, 6, 3)
    with Image.open(tmp_path / "out" / "chain.gif") as film:
        assert film.n_frames == 5
    assert set(result.predicted) == {"cat", "dog", "ant"}


def test_samples_lie_beside_the_run_and_not_among_its_own_pictures(made, tmp_path, monkeypatch):
    shutil.copytree(made[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    first = sampling.sample(str(tmp_path / "run"), ["count=10", "class=all", "steps=2"])
    again = sampling.sample(str(tmp_path / "run"), ["count=10", "class=all", "steps=2"])
    other = sampling.sample(str(tmp_path / "run"), ["count=10", "class=all", "steps=2", "sgld.step_size=0.5"])
    assert first.folder == again.folder != other.folder
    assert first.folder.startswith(str(tmp_path / "run" / "sampled" / "fresh-10-all-2steps-seed0-"))
    assert sorted(path.name for path in (tmp_path / "run" / "sampled").iterdir()) == sorted(
        folder.rpartition("/")[2] for folder in (first.folder, other.folder)
    )
    portable(tmp_path / "alone")
    here = sampling.sample("alone", ["count=2", "steps=1"])
    assert here.folder.startswith(str(tmp_path / "sampled" / "run" / "fresh-2-1steps-seed0-"))


# mistakes


def test_all_mistakes_are_named_at_once(made, tmp_path):
    with pytest.raises(ConfigError) as caught:
        sampling.sample_config(["count=0", "clas=3", "frames=1", "nonsense", "init=warm"])
    for part in ("count: is 0", "did you mean 'class'?", "frames: is 1", "'nonsense'", "init: is 'warm'"):
        assert part in str(caught.value)
    (tmp_path / "file").write_text("")
    settings = ["init=buffer", "count=5000", "class=eleven", f"out={tmp_path / 'file'}"]
    with pytest.raises(ConfigError) as caught:
        sampling.sample(str(made[0]), settings)
    for part in ("holds 120 chains", "class: is 'eleven', must be all, a number from 0 to 9", "file is a file"):
        assert part in str(caught.value)


def test_a_folder_of_other_things_is_left_as_it_is(made, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"out: .*thesis holds thesis.tex, which is no file of samples"):
        sampling.sample(str(made[0]), ["steps=0", f"out={tmp_path / 'thesis'}"])
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="must be a folder on this machine"):
        sampling.sample(str(made[0]), ["steps=0", "out=s3://bucket/samples"])


def test_a_classifier_draws_nothing(tmp_path):
    fit(tmp_path / "run", "steps=2", "objective.p_x_weight=0")
    with pytest.raises(ConfigError, match=r"MODEL: .* was trained without chains"):
        sampling.sample(str(tmp_path / "run"), [f"out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_chains_that_are_not_finite_end_it_with_their_step_and_write_nothing(drawn, tmp_path):
    before = drawn("count=3", "steps=1")[1]
    with pytest.raises(DivergedError, match=r"chains are not finite at step 1 of 9; .* lower sgld.step_size"):
        drawn("count=3", "steps=9", "sgld.step_size=1e39")
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "samples.npy"), before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_damaged_chains_are_said_to_be_so(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "run")
    shard = next((tmp_path / "run" / "checkpoints").glob("60/chains-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"chains-00000-of-00001\.safetensors"):
        sampling.sample(str(tmp_path / "run"), ["init=buffer", f"out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_progress_is_a_line_every_tenth(drawn, capsys):
    drawn("count=150", "steps=10")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"sampling one: {percent} %" for percent in range(10, 101, 10)]


@pytest.mark.timeout(120)
def test_a_registered_model_draws_what_its_folder_does_and_says_which_class_is_which(migrated, tmp_path):
    from mlflow import MlflowClient

    portable(tmp_path / "model")
    shutil.copyfile(migrated, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri, uri)
    run = client.create_run(client.create_experiment("jem", f"{tmp_path}/artifacts")).info
    client.log_artifacts(run.run_id, str(tmp_path / "model"), "model/data")
    client.create_registered_model("net")
    client.create_model_version("net", f"{run.artifact_uri}/model", run.run_id)
    settings = ["count=2", "steps=1", "class=ant"]
    there = sampling.sample("models:/net/1", [*settings, f"tracking.uri={uri}", f"out={tmp_path / 'there'}"])
    here = sampling.sample(str(tmp_path / "model"), [*settings, f"out={tmp_path / 'here'}"])
    assert there.metrics == here.metrics
    said = json.loads((tmp_path / "there" / "samples.json").read_text())
    assert (said["model"]["source"], said["settings"]["class"], said["labels"]) == ("models:/net/1", "ant", [2, 2])
