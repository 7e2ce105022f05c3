import torch

from jem.config import SGLDConfig
from jem.evaluate.scores import RELEASED, approx_mass, log_px, max_py, refinement


def logits_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_scores_are_log_p_of_x_and_log_max_p_of_y():
    logits = logits_of([1.0, 3.0], [2.0, 6.0], [0.0, 0.5])
    torch.testing.assert_close(log_px(logits).exp(), torch.tensor([4.0, 8.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(max_py(logits).exp(), torch.tensor([0.75, 0.75, 1.0], dtype=torch.float64))


def test_max_p_of_y_still_orders_predictions_that_float32_rounds_to_certainty():
    confident = torch.tensor([[20.0, 0.0], [30.0, 0.0], [60.0, 0.0], [0.0, 600.0]])
    assert confident.softmax(dim=1).max(dim=1).values.tolist() == [1.0] * 4
    a, b, c, d = max_py(confident).tolist()
    assert a < b < c < d < 0


def test_approx_mass_is_minus_the_norm_of_the_gradient_of_log_p_in_closed_form(generator):
    """f(x)[y] = -|x - m_y|^2 / 2: d log p / dx = sum_y p(y|x) (m_y - x)."""
    means = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(6, 1, 2, 2, generator=generator, dtype=torch.float64)

    def network(x):
        return -(x.flatten(1)[:, None] - means).square().sum(dim=2) / 2

    gradient = network(x).softmax(dim=1) @ means - x.flatten(1)
    with torch.no_grad():
        mass = approx_mass(network, x)
    torch.testing.assert_close(mass, -gradient.norm(dim=1))
    assert not x.requires_grad


def bowls(x):
    """Logits of two classes, each a bowl: energies have a closed form and a gradient."""
    x = x.flatten(1)
    return torch.stack([-(x - 1).square().sum(dim=1) / 4, -(x + 2).square().sum(dim=1) / 4], dim=1)


def test_refinement_is_what_the_released_code_computes(generator):
    """eval_wrn_ebm.py, `logp_hist`, with the noise drawn in the same order."""
    x = torch.randn(6, 1, 2, 2, generator=generator)
    x_k = x.clone()
    noise = torch.Generator().manual_seed(1)
    for _ in range(20):
        x_k.requires_grad_(True)
        (gradient,) = torch.autograd.grad(bowls(x_k).logsumexp(1).sum(), x_k)
        x_k = x_k.detach() + gradient + 0.01 * torch.randn(x.shape, generator=noise)
    before, after = bowls(x).logsumexp(1), bowls(x_k).logsumexp(1)
    expected = torch.stack([before - after, -(x - x_k).flatten(1).norm(dim=1)], dim=1)
    torch.testing.assert_close(refinement(bowls, x, torch.Generator().manual_seed(1)), expected)
    assert (RELEASED.step_size, RELEASED.noise_scale, RELEASED.clamp) == (1.0, 0.01, None)


def test_without_noise_a_bowl_is_refined_to_its_middle(generator):
    """f(x) = -|x|^2 / 4 and step 1 halve x each time: x_K = x / 2^K."""
    x = torch.randn(5, 1, 2, 2, generator=generator, dtype=torch.float64)

    def network(x):
        return -x.flatten(1).square().sum(dim=1, keepdim=True) / 4

    found = refinement(network, x, generator, SGLDConfig(steps=3, step_size=1.0, noise_scale=1e-12))
    size = x.flatten(1).norm(dim=1)
    torch.testing.assert_close(found, torch.stack([-(size**2) * (1 - 1 / 64) / 4, -size * 7 / 8], dim=1))


def test_an_image_at_a_mode_has_less_to_gain_than_one_beside_it(generator):
    at_mode = torch.ones(1, 1, 2, 2)
    found = refinement(bowls, torch.cat([at_mode, at_mode + 3]), generator)
    assert (found[0] > found[1]).all()


def test_refinement_leaves_images_and_gradients_alone_also_without_grad(generator):
    x = torch.randn(3, 1, 2, 2, generator=generator)
    before = x.clone()
    with torch.no_grad():
        found = refinement(bowls, x, generator)
    assert not found.requires_grad
    assert torch.equal(x, before)


def test_the_same_generator_refines_the_same_and_another_one_otherwise(generator):
    x = torch.randn(4, 1, 2, 2, generator=generator)
    a, b, c = (refinement(bowls, x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == (4, 2)
