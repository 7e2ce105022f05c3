import math

import pytest
import torch
from scipy import stats
from toys import small

from jem import prior as module
from jem.checkpoint import prior_tensors, read_manifest, restore
from jem.config import ReplayConfig
from jem.data.splits import Split
from jem.errors import ConfigError
from jem.files import Location
from jem.predict import Card, read_prior, read_weights, save
from jem.prior import Prior, draw_gaussian, fit_classes, fit_gaussian, make_prior
from jem.replay import ReplayBuffer
from jem.saving import save as save_checkpoint
from jem.train import start
from jem.world import World

SHAPE = (1, 4, 4)


def images_of(n, generator, shape=SHAPE, scale=20.0):
    """Correlated pixels around 128: a random walk's."""
    steps = torch.randn(n, torch.Size(shape).numel(), generator=generator)
    return (128 + scale * steps.cumsum(dim=1) / 4).clamp(0, 255).to(torch.uint8).view(n, *shape)


def split_of(generator, n=600, classes=3):
    labels = torch.arange(n) % classes
    images = images_of(n, generator)
    images[labels == 1] = (images[labels == 1] // 2).contiguous()
    return Split(images, labels)


def as_floats(images):
    return (images.double() / 127.5 - 1).flatten(1)


def test_the_uniform_prior_is_what_it_was(generator):
    drawn = Prior(ReplayConfig(), SHAPE).sample(torch.zeros(5, dtype=torch.int64), generator)
    again = torch.Generator().manual_seed(generator.initial_seed())
    assert torch.equal(drawn, torch.rand(5, *SHAPE, generator=again) * 2 - 1)


def test_the_whole_gaussian_has_each_classs_sample_mean_and_covariance(generator):
    split = split_of(generator)
    fitted = fit_gaussian(split.images, split.labels, 3, None)
    assert fitted.factor.shape == (3, 16, 16)
    for c in range(3):
        x = as_floats(split.images[split.labels == c])
        torch.testing.assert_close(fitted.mean[c], x.mean(dim=0).float())
        covariance = fitted.factor[c] @ fitted.factor[c].T + fitted.rest[c] ** 2 * torch.eye(16)
        torch.testing.assert_close(covariance, torch.cov(x.T, correction=0).float(), atol=1e-6, rtol=1e-4)


def test_what_is_drawn_has_that_mean_and_covariance(generator):
    """Of n draws a mean has the standard error sqrt(s_ii / n), a covariance sqrt((s_ii s_jj + s_ij^2) / n)."""
    split, n = split_of(generator), 20_000
    fitted = fit_gaussian(split.images, split.labels, 3, 4)
    drawn = draw_gaussian(fitted, torch.full((n,), 2), generator).double()
    factor = fitted.factor[2].double()
    expected = factor @ factor.T + fitted.rest[2].double() ** 2 * torch.eye(16, dtype=torch.float64)
    assert (drawn.abs() < 1).double().mean() > 0.999, "so that what is cut off does not matter here"
    error = (expected.diag() / n).sqrt()
    assert ((drawn.mean(dim=0) - fitted.mean[2]).abs() < 4.5 * error).all()
    spread = ((expected.diag()[:, None] * expected.diag() + expected.square()) / n).sqrt()
    assert ((torch.cov(drawn.T) - expected).abs() < 5 * spread).all()


def test_of_low_rank_it_is_the_most_likely_one(generator):
    """Kept directions have their variance, the others share what is left; no neighbour is likelier."""
    split = split_of(generator, 900, 1)
    fitted = fit_gaussian(split.images, split.labels, 1, 3)
    x = as_floats(split.images)
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    assert fitted.rest[0].item() ** 2 == pytest.approx(values[3:].mean().item(), rel=1e-4)
    assert fitted.factor[0].square().sum().item() == pytest.approx(
        (values[:3] - values[3:].mean()).sum().item(), rel=1e-4
    )

    def likelihood(factor, rest):
        covariance = factor @ factor.T + rest**2 * torch.eye(16, dtype=torch.float64)
        return stats.multivariate_normal(fitted.mean[0].double(), covariance).logpdf(x).sum()

    factor, rest = fitted.factor[0].double(), fitted.rest[0].item()
    best = likelihood(factor, rest)
    for nudged in (factor * 1.05, factor * 0.95, factor + 0.02 * torch.randn(16, 3, generator=generator).double()):
        assert likelihood(nudged, rest) < best
    assert max(likelihood(factor, rest * 1.05), likelihood(factor, rest * 0.95)) < best


def test_large_images_get_the_same_gaussian_from_the_first_directions_alone(generator, monkeypatch):
    images, labels = images_of(300, generator, (1, 8, 8)), torch.arange(300) % 2
    direct = fit_gaussian(images, labels, 2, 5)
    monkeypatch.setattr(module, "DIRECT", 10)
    quick = fit_gaussian(images, labels, 2, 5)
    torch.testing.assert_close(quick.mean, direct.mean)
    torch.testing.assert_close(quick.rest, direct.rest, rtol=1e-3, atol=0)
    for mine, theirs in zip(quick.factor, direct.factor, strict=True):
        torch.testing.assert_close(mine @ mine.T, theirs @ theirs.T, atol=1e-5, rtol=1e-2)
    few = fit_gaussian(images[:24], labels[:24], 2, 15)  # twelve of a class have eleven directions
    assert few.factor.isfinite().all()
    assert (few.factor.norm(dim=1) > 1e-3).sum(dim=1).tolist() == [11, 11]


def test_a_class_without_images_starts_like_all(generator):
    split = split_of(generator, classes=2)
    fitted = fit_gaussian(split.images, split.labels, 3, None)
    whole = fit_gaussian(split.images, torch.zeros_like(split.labels), 1, None)
    for mine, theirs in zip(fitted, whole, strict=True):
        assert torch.equal(mine[2], theirs[0])


@pytest.mark.parametrize("n", [1, 2, 9, 10])
def test_a_class_of_few_images_starts_like_all_and_not_at_one_of_them(generator, n):
    split = split_of(generator, classes=2)
    labels = (torch.arange(len(split)) < n).long()
    fitted = fit_gaussian(split.images, labels, 2, None)
    whole = fit_gaussian(split.images, torch.zeros_like(labels), 1, None)
    assert torch.equal(fitted.mean[1], whole.mean[0]) == (n < 10)
    assert not torch.equal(fitted.mean[0], whole.mean[0])


def test_a_large_class_is_fitted_by_a_part_of_it(generator, monkeypatch):
    split = split_of(generator, classes=1)
    numbers = split.images[0].numel()
    monkeypatch.setattr("jem.prior.FITTED", numbers * (len(split) // 2))
    found = fit_gaussian(split.images, split.labels, 1, None)
    half = split.images[torch.arange(len(split) // 2) * len(split) // (len(split) // 2)]
    assert all(map(torch.equal, found, fit_gaussian(half, torch.zeros(len(half), dtype=torch.int64), 1, None)))


def test_without_labels_all_classes_start_alike(generator):
    """Labels that a semi-supervised run does not have must not get in through its prior."""
    split = split_of(generator)
    for name in ("gaussian", "data"):
        config = small(replay__prior=name, data__labels_per_class=2)
        prior = made(config, split)
        shuffled = made(config, Split(split.images, split.labels.flip(0)))
        labels = torch.arange(30) % 3
        draws = [p.sample(labels, torch.Generator().manual_seed(0)) for p in (prior, shuffled)]
        assert torch.equal(*draws)


def made(config, split, classes=3):
    return make_prior(config, split, classes, fit_classes(config, split, classes), "cpu")


def test_data_starts_are_images_of_the_chains_class_each_as_likely_with_noise(generator):
    split = Split(
        (torch.arange(30, dtype=torch.uint8) + 100).view(30, 1, 1, 1).expand(30, 1, 4, 4), torch.arange(30) % 3
    )
    prior = made(small(replay__prior="data", replay__prior_noise=0.0), split)
    drawn = prior.sample(torch.full((5000,), 1), generator)[:, 0, 0, 0]
    rows = ((drawn + 1) * 127.5).round().long() - 100
    counts = torch.bincount(rows, minlength=30)
    assert counts[split.labels != 1].sum() == 0
    assert stats.chisquare(counts[split.labels == 1]).pvalue > 1e-4
    noisy = made(small(replay__prior="data", replay__prior_noise=0.1), split)
    off = noisy.sample(torch.full((5000,), 1), torch.Generator().manual_seed(0)).flatten(1).var(dim=1).mean()
    assert off.item() == pytest.approx(0.01, rel=0.03)


@pytest.mark.parametrize("name", ["gaussian", "data"])
def test_a_start_without_the_prior_that_is_due_says_what_to_give(name):
    with pytest.raises(ConfigError, match=f"replay.prior: is {name}, .*jem.prior.make_prior"):
        start(small(replay__prior=name), SHAPE, 3)
    assert start(small(replay__prior=name, objective__p_x_weight=0), SHAPE, 3).replay is None, "no chains, no prior"


def test_a_share_starts_uniform(generator):
    split = split_of(generator)
    prior = made(small(replay__prior="gaussian", replay__uniform_share=0.3), split)
    drawn = prior.sample(torch.zeros(4000, dtype=torch.int64), generator)
    wide = (drawn.flatten(1).std(dim=1) > 0.4).double().mean().item()  # uniform 0.58, these images less than 0.3
    assert abs(wide - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)


def test_scored_samples_never_start_at_a_training_image(generator):
    split = split_of(generator)
    prior = made(small(replay__prior="data", replay__prior_noise=0.0), split)
    labels = torch.arange(50) % 3
    assert all(
        (split.images.float() / 127.5 - 1 == x).flatten(1).all(dim=1).any() for x in prior.sample(labels, generator)
    )
    drawn = prior.without_images().sample(labels, generator)
    assert not any(
        torch.isclose(split.images.float() / 127.5 - 1, x, atol=0.02).flatten(1).all(dim=1).any() for x in drawn
    )
    assert set(prior.tensors()) == {"mean", "factor", "rest"}, "and none is kept in a checkpoint"


@pytest.mark.parametrize("name", ["gaussian", "data"])
def test_new_chains_of_the_buffer_are_of_their_slots_class(name, generator):
    split = split_of(generator)
    prior = made(
        small(replay__prior=name, replay__reinit_prob=1.0, replay__capacity=300, replay__prior_noise=0.01), split
    )
    shard = ReplayBuffer.start(prior, 3, World(), generator)
    means = torch.stack([(split.images[split.labels == c].float() / 127.5 - 1).mean() for c in range(3)])
    of = torch.arange(300) % 3
    drawn = shard.draw(300, generator)
    for x, labels in ((shard.chains, of), (drawn.x, drawn.labels)):
        assert x[labels == 1].mean().item() == pytest.approx(means[1].item(), abs=0.05)
        assert x[labels == 2].mean().item() == pytest.approx(means[2].item(), abs=0.05)
    assert abs(means[1] - means[2]) > 0.3


def test_checkpoints_and_models_hold_it_and_a_run_goes_on_with_what_it_began_with(generator, tmp_path):
    config = small(replay__prior="gaussian", replay__capacity=20, model__name="small_conv", model__channels=[3])
    split, other = split_of(generator), split_of(torch.Generator().manual_seed(7))
    state = start(config, SHAPE, 3, prior=made(config, split))
    save_checkpoint(Location.of(tmp_path / "0"), state, World(), {}, {"meter": torch.zeros(1)})
    manifest = read_manifest(Location.of(tmp_path / "0"))
    manifest.verify()
    fresh = start(config, SHAPE, 3, prior=made(config, other))  # as if another machine had fitted a little otherwise
    restore(manifest, fresh, World(), config.seed)
    for mine, theirs in zip(fresh.replay.prior.gaussian, state.replay.prior.gaussian, strict=True):
        assert torch.equal(mine, theirs)
    weights = state.network.state_dict()
    card = Card({}, SHAPE, ("a", "b", "c"), 1.0, 0.0, "NHWC", "uint8", "digest")
    save(tmp_path / "model", card, weights, prior_tensors(manifest))
    assert read_weights(tmp_path / "model").keys() == weights.keys()
    told = read_prior(tmp_path / "model")
    assert all(torch.equal(told[name], value) for name, value in state.replay.prior.tensors().items())
    save(tmp_path / "plain", card, weights)
    assert read_prior(tmp_path / "plain") == {}
