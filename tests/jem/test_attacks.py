"""Attacks on nets whose radius is known, and beside foolbox's own on a trained one."""

import math

import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from jem.config import AttackConfig, DataConfig, EvaluateConfig, JEMConfig, ModelConfig, SGLDConfig
from jem.data.augment import to_float
from jem.data.sources import load
from jem.energy import energy_fn
from jem.errors import JEMError
from jem.evaluate import robustness
from jem.evaluate.attacks import NORMS, is_wrong, margin, norm_of, of_foolbox, pgd, project, square
from jem.evaluate.extractors import WEIGHTS, lenet
from jem.evaluate.refined import differentiable, refined
from jem.evaluate.robust_figures import _rounded, accuracy_at, wilson
from jem.evaluate.smallest import Smallest
from jem.sgld import sgld_chain

DUAL = {"linf": 1.0, "l2": 2.0}


class Linear(nn.Module):
    """f(x) = W (x - offset): the nearest image of class j is |f_y - f_j| / ||W_y - W_j||_dual away, within [0, 1]."""

    def __init__(self, classes, generator, offset=0.5):
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.randn(classes, 36, generator=generator))

    def forward(self, x):
        return (x.flatten(1) - self.offset) @ self.weight.T

    def radius(self, x, norm):
        logits = self(x).detach()
        y = logits.argmax(dim=1)
        between = torch.linalg.vector_norm(self.weight[y][:, None] - self.weight[None], DUAL[norm], dim=2)
        gap = logits.gather(1, y[:, None]) - logits
        return torch.where(gap > 0, gap / between, math.inf).amin(dim=1).detach()


def grey(n, generator):
    return 0.35 + 0.3 * torch.rand(n, 1, 6, 6, generator=generator)


def found_by(candidates, net, x, y, norm, limit):
    smallest = Smallest(x, y, norm, torch.zeros(len(x), dtype=torch.bool))
    smallest.offer(torch.arange(len(x)), candidates, net, limit)
    return smallest.found


@pytest.mark.parametrize(("name", "norm", "slack"), [("fmn", "linf", 0.01), ("ddn", "l2", 0.02), ("cw", "l2", 0.05)])
def test_minimum_norm_attacks_find_the_radius_of_a_linear_net(generator, name, norm, slack):
    net = Linear(5, generator, offset=0.0)  # radii of .1 and more
    x = grey(60, generator)
    y = net(x).argmax(dim=1)
    radius = net.radius(x, norm)
    found = found_by(of_foolbox(name, net, x, y, 100, 0), net, x, y, norm, None)
    assert (found >= radius * (1 - 1e-4)).all()
    assert (found <= radius * (1 + slack)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
def test_pgd_breaks_the_images_of_a_linear_net_whose_radius_is_within_eps_and_no_other(generator, norm, loss):
    net = Linear(2, generator)
    x = grey(80, generator)
    y = net(x).argmax(dim=1)
    radius = net.radius(x, norm)
    for eps in radius.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist():
        within = found_by(pgd(net, x, y, norm, eps, 20, generator, loss)[0], net, x, y, norm, eps) <= eps
        assert within[radius < 0.97 * eps].all()
        assert not within[radius > 1.0001 * eps].any()


@pytest.mark.parametrize("norm", NORMS)
def test_random_search_breaks_most_of_what_can_be_broken_without_a_gradient(generator, norm):
    net = Linear(2, generator)
    x = grey(80, generator)
    y = net(x).argmax(dim=1)
    radius = net.radius(x, norm)

    def blind(images):
        assert not torch.is_grad_enabled()
        return net(images)

    eps = radius.quantile(0.8).item()
    within = found_by(square(blind, x, y, norm, eps, 500, generator), net, x, y, norm, eps) <= eps
    assert within[radius < 0.7 * eps].float().mean() > 0.9
    assert not within[radius > 1.0001 * eps].any()


@pytest.mark.parametrize("norm", NORMS)
def test_more_queries_never_raise_the_margin(generator, norm):
    net = Linear(4, generator)
    x = grey(20, generator)
    y = net(x).argmax(dim=1)

    eps = net.radius(x, norm).median().item()

    def after(queries):
        made = square(net, x, y, norm, eps, queries, torch.Generator().manual_seed(3))
        return margin(net(made), y).mean()

    margins = [after(queries).item() for queries in (1, 30, 300)]
    assert margins[0] > margins[1] > margins[2]


@pytest.mark.parametrize("norm", NORMS)
def test_a_projected_point_is_within_eps_and_a_nearer_one_stays(generator, norm):
    x = torch.rand(9, 1, 6, 6, generator=generator)
    far = x + torch.randn(x.shape, generator=generator)
    held = project(far, x, norm, 0.2)
    assert norm_of(held - x, norm).amax() <= 0.2 + 1e-6
    assert held.amin() >= 0
    assert held.amax() <= 1
    near = (x + 0.01 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    torch.testing.assert_close(project(near, x, norm, 0.2), near)


@pytest.fixture(scope="module")
def digits():
    """A real classifier, and test images on [0, 1]."""
    from safetensors.torch import load_file

    data = load(DataConfig(name="digits"))
    net = lenet(ModelConfig(), data.image_shape, data.n_classes)
    net.load_state_dict(load_file(WEIGHTS / "lenet_digits.safetensors"))
    return (lambda x: net(2 * x - 1)), (to_float(data.test.images) + 1) / 2, data.test.labels


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.08), ("l2", 0.5)])
def test_pgd_leaves_as_many_digits_standing_as_foolboxs_does(digits, generator, norm, eps):
    import foolbox

    from jem.evaluate.attacks import _AsModule

    net, x, y = digits
    steps = 40
    wrong = net(x).argmax(dim=1) != y
    ours = Smallest(x, y, norm, wrong)
    ours.offer(torch.arange(len(x)), pgd(net, x, y, norm, eps, steps, generator)[0], net, eps)
    standing = int((ours.found > eps).sum())
    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    model = foolbox.PyTorchModel(_AsModule(net).eval(), bounds=(0, 1), device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, _, fooled = kind(rel_stepsize=2.5 / steps, steps=steps)(model, x, y, epsilons=eps)
    theirs = int((~(fooled | wrong)).sum())
    low, high = binomtest(theirs, len(x)).proportion_ci(0.95)
    assert 0.05 < theirs / len(x) < 0.95  # neither attack is idle nor overwhelming
    assert low <= standing / len(x) <= high


def test_only_a_candidate_that_is_nearer_and_wrong_is_kept(generator):
    net = Linear(2, generator)
    x = grey(4, generator)
    y = net(x).argmax(dim=1)
    towards = (net.weight[1 - y] - net.weight[y]).detach().view_as(x)
    towards = towards / norm_of(towards, "l2")[:, None, None, None]
    radius = net.radius(x, "l2")[:, None, None, None]
    smallest = Smallest(x, y, "l2", torch.tensor([False, False, False, True]))
    rows = torch.arange(4)
    assert not smallest.offer(rows, x + 0.9 * radius * towards, net, 1.0).any()
    assert smallest.found.tolist() == [math.inf, math.inf, math.inf, 0]
    smallest.offer(rows, x + 1.5 * radius * towards, net, 2.0)
    smallest.offer(rows, x + 1.2 * radius * towards, net, 2.0)
    smallest.offer(rows, x + 1.4 * radius * towards, net, 2.0)
    torch.testing.assert_close(smallest.found[:3], 1.2 * radius[:3].flatten())
    assert smallest.found[3] == 0
    torch.testing.assert_close(smallest.adversarials[:3], x[:3] + 1.2 * radius[:3] * towards[:3])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda x: x * math.nan, "not finite"),
        (lambda x: x + 0.8, r"left \[0, 1\]"),
        (lambda x: x + 0.11, r"eps 0\.1 returned a perturbation of 0\.11"),
    ],
)
def test_an_attack_that_fails_is_an_error_and_no_survivor(generator, spoil, says):
    net = Linear(2, generator)
    x = grey(3, generator)
    smallest = Smallest(x, net(x).argmax(dim=1), "linf", torch.zeros(3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=says):
        smallest.offer(torch.arange(3), spoil(x), net, 0.1)


def test_a_defence_with_noise_is_not_asked_until_it_is_wrong_by_chance(generator, monkeypatch):
    """A coin that is wrong for one answer in ten: attacks that change nothing leave what one answer leaves."""
    x = 2 * grey(400, generator) - 1
    labels = torch.zeros(400, dtype=torch.int64)

    def coin(logits, k, config, copies, copy_noise, noise, straight=False, thrifty=False):
        def classify(images):
            lost = torch.rand(len(images), generator=noise) < 0.1
            return torch.stack([torch.where(lost, -1.0, 1.0), torch.zeros(len(images))], dim=1) + 0 * images.sum()

        return classify

    monkeypatch.setattr(robustness, "refined", coin)
    settings = EvaluateConfig(suite="full", attack=AttackConfig(steps=2, restarts=3, queries=3, min_norm_steps=3))
    rows = robustness.attack(lambda images: images, x, labels, 1, JEMConfig(seed=0), settings, generator)
    parts = robustness.split(rows, settings, 1, 36)
    assert 0.05 < parts["wrong"].mean() < 0.15
    for name in ("linf/pgd", "linf/fmn", "linf/square", "l2/pgd", "l2/ddn"):
        assert torch.equal(parts[name] < math.inf, parts["wrong"] > 0), name


class Broken(nn.Module):
    """No number where the left upper pixel is above a half; else sure of class 0."""

    def __init__(self, gradient):
        super().__init__()
        self.gradient = gradient

    def forward(self, x):
        first = x[:, 0, 0, 0]
        value = torch.where(first > 0.5, math.nan, 3.0)
        if self.gradient:  # a finite value whose gradient is none: 0 times infinity
            value = 3.0 + (first * 0).abs().sqrt()
        return torch.stack([value, torch.zeros_like(value)], dim=1)


def test_an_answer_that_is_no_number_is_wrong_and_a_gradient_that_is_none_is_an_error(generator):
    x = grey(6, generator)
    x[:3, 0, 0, 0], x[3:, 0, 0, 0] = 0.9, 0.1
    labels = torch.zeros(6, dtype=torch.int64)
    assert is_wrong(Broken(False)(x), labels).tolist() == [True] * 3 + [False] * 3
    assert is_wrong(torch.zeros(1, 2), labels[:1]).item()  # a tie is no answer
    with pytest.raises(JEMError, match=r"not finite for 6 of 6 attacked images .*evaluate\.attack\.refine"):
        pgd(Broken(True), x, labels, "linf", 0.1, 2, generator)


def energy_net(generator):
    """Smooth, float64, with second derivatives that matter."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 3)).double()


@pytest.mark.parametrize("k", [1, 3])
def test_the_gradient_goes_through_the_refinement_as_finite_differences_do(generator, k):
    net = energy_net(generator)
    x = torch.rand(2, 1, 3, 3, generator=generator, dtype=torch.float64)
    sgld = SGLDConfig(step_size=0.7, noise_scale=0.05)

    def value(images):
        jem = refined(net, k, sgld, 2, 0.1, torch.Generator().manual_seed(5))  # the same noise each time
        return jem(images).square().sum()

    position = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(position), position)
    (unmoved,) = torch.autograd.grad(net(2 * position - 1).square().sum(), position)
    for index in [(0, 0, 0, 0), (1, 0, 2, 1)]:
        step = torch.zeros_like(x)
        step[index] = 1e-5
        numeric = (value(x + step) - value(x - step)) / 2e-5
        torch.testing.assert_close(gradient[index], numeric.detach(), rtol=1e-5, atol=1e-8)
    assert (gradient - unmoved).norm() > 0.05 * unmoved.norm()  # it is not the identity's


@pytest.mark.parametrize("room", [6, 2, 1])
def test_a_thrifty_refinement_has_the_same_gradient_in_pieces_that_there_is_room_for(generator, room):
    net, x = energy_net(generator), torch.rand(3, 1, 3, 3, generator=generator, dtype=torch.float64)
    sgld, sizes = SGLDConfig(step_size=0.7, noise_scale=0.05), []

    def cramped(images):
        """On a device that has room for the graph of `room` images."""
        if images.grad_fn is not None and len(images) > room:
            raise torch.OutOfMemoryError
        sizes.append(len(images))
        return net(images)

    def gradient(logits, **how):
        position = x.clone().requires_grad_(True)
        jem = refined(logits, 3, sgld, 2, 0.1, torch.Generator().manual_seed(5), **how)
        found = jem(position)
        return found, torch.autograd.grad(found.square().sum(), position)[0]

    if room < 6:
        with pytest.raises(torch.OutOfMemoryError):
            gradient(cramped)
        sizes.clear()
    for one, other in zip(gradient(net), gradient(cramped, thrifty=True), strict=True):
        torch.testing.assert_close(one, other)
    assert min(sizes) == room


def test_straight_past_the_refinement_the_answer_is_the_same_and_the_gradient_that_where_it_ends(
    generator,
):
    net, x = energy_net(generator), torch.rand(2, 1, 3, 3, generator=generator, dtype=torch.float64)

    def jem(straight):
        sgld = SGLDConfig(step_size=0.7, noise_scale=0.0)
        return refined(net, 2, sgld, 3, 0.0, torch.Generator().manual_seed(5), straight)

    position = x.clone().requires_grad_(True)
    logits = jem(True)(position)
    torch.testing.assert_close(logits, jem(False)(position))
    (gradient,) = torch.autograd.grad(logits.square().sum(), position)
    moved = 2 * x - 1
    for _ in range(2):
        _, slope = differentiable(False, energy_fn(net), moved)
        moved = moved - 0.7 * slope
    moved.requires_grad_(True)
    (there,) = torch.autograd.grad(net(moved).square().sum(), moved)
    torch.testing.assert_close(gradient, 2 * there)  # [0, 1] to [-1, 1]


def test_a_refinement_that_hides_its_gradient_gains_nothing_against_what_fools_jem_0(generator, monkeypatch):
    """JEM-k that answers as JEM-0 does, with a gradient that leads nowhere: it may look no stronger."""
    net = Linear(2, generator)
    x = 2 * grey(40, generator) - 1
    labels = net(x).argmax(dim=1)

    def hiding(logits, k, config, copies, copy_noise, noise, straight=False, thrifty=False):
        def classify(images):
            found = logits(2 * images - 1)
            return found.detach() + 0 * images.sum() if k else found

        return classify

    monkeypatch.setattr(robustness, "refined", hiding)
    counts = AttackConfig(steps=10, restarts=2, queries=3, min_norm_steps=20)
    settings = EvaluateConfig(suite="full", attack=counts)
    config = JEMConfig(seed=0)
    rows = {k: robustness.attack(net, x, labels, k, config, settings, generator) for k in (0, 1)}
    found = {k: robustness.split(rows[k], settings, k, 36) for k in rows}
    of_norm = {"linf": settings.attack.linf, "l2": settings.attack.l2}
    for name in ("linf/pgd", "l2/pgd", "linf/fmn", "l2/ddn"):
        eps = of_norm[name.partition("/")[0]]
        by_k = [[accuracy_at(found[k][name], e)[0] for e in eps] for k in (0, 1)]
        assert by_k[0][-1] < 0.5
        assert by_k[1] == pytest.approx(by_k[0], abs=0.05)


def test_jem_0_is_the_network_and_jem_k_the_mean_over_copies_moved_down_the_energy(generator):
    net = energy_net(generator)
    x = torch.rand(4, 1, 3, 3, generator=generator, dtype=torch.float64)
    assert torch.equal(refined(net, 0, SGLDConfig(), 5, 0.1, generator)(x), net(2 * x - 1))
    quiet = SGLDConfig(step_size=0.3, noise_scale=0.0)
    position = 2 * x - 1
    for _ in range(4):
        position = position.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(net(position).logsumexp(dim=1).sum(), position)
        position = position + 0.3 * gradient
    torch.testing.assert_close(refined(net, 4, quiet, 3, 0.0, generator)(x), net(position))
    noisy = refined(net, 1, quiet, 4000, 0.2, generator)(x[:1])
    once = torch.cat([refined(net, 1, quiet, 1, 0.2, generator)(x[:1]) for _ in range(400)])
    assert ((noisy - once.mean(dim=0)).abs() < 5 * once.std(dim=0) / 20).all()


def test_the_refinement_takes_the_steps_of_a_chains_schedule(generator):
    net = energy_net(generator)
    x = torch.rand(3, 1, 3, 3, generator=generator, dtype=torch.float64)
    falling = SGLDConfig(steps=3, step_size=0.9, final_step_size=0.1, noise_scale=0.0)
    position, _ = sgld_chain(energy_fn(net), 2 * x - 1, falling, generator)
    torch.testing.assert_close(refined(net, 3, falling, 1, 0.0, generator)(x), net(position))


@pytest.mark.parametrize(("hits", "n"), [(0, 100), (37, 100), (360, 360), (1, 3), (0, 1000), (200, 200)])
def test_intervals_of_shares_are_wilsons(hits, n):
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson(hits, n) == pytest.approx([hits / n, expected.low, expected.high], abs=1e-6)
    share, low, high = wilson(hits, n)
    assert low <= share <= high  # to the last bit, for who draws it


def test_an_adversarial_at_eps_itself_counts_and_one_beyond_does_not():
    found = torch.tensor([0.0, 0.2, 0.20001, math.inf], dtype=torch.float64)
    assert accuracy_at(found, 0.2)[0] == 0.5


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 8, 16])
def test_an_eps_of_more_digits_than_are_kept_is_rounded_as_the_norms_are(levels):
    eps = levels / 255
    assert accuracy_at(_rounded(torch.tensor([eps, eps * 1.001])), eps)[0] == 0.5
