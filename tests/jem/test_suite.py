import base64
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn
from toys import small

from jem.config import AttackConfig, EvaluateConfig, GenerateConfig
from jem.data.augment import to_float
from jem.data.splits import DataSet, Split
from jem.errors import ConfigError, DivergedError, Problem
from jem.evaluate import ood, passes, refined, robustness
from jem.evaluate.against import BINNED, against, transfer, transfer_metrics
from jem.evaluate.attacks import norm_of
from jem.evaluate.calibration import confidence_bins, ece
from jem.evaluate.evaluate import BATCH, validate
from jem.evaluate.extractors import to_bytes
from jem.evaluate.generation import at_random
from jem.evaluate.intervals import Interval
from jem.evaluate.measured import Measured
from jem.evaluate.passes import Part, Pass, run_pass
from jem.evaluate.report import plain
from jem.evaluate.robustness import distal
from jem.evaluate.sampled import evenly, fairly
from jem.evaluate.sets import interpolations
from jem.evaluate.suite import compute_here, evaluate, prepare
from jem.world import World

LIKE = torch.zeros(())
CONFIG = small(
    data__name="parquet", data__root="/nowhere", data__crop_padding=0, replay__reinit_prob=0.6
)  # images of no known data set
MADE = ("interp", "uniform", "gaussian", "constant", "rot90")
GENTLE = {
    "attack": AttackConfig(
        images=7,
        linf=(0.05, 0.2),
        l2=(0.3, 1.0),
        refine=(0, 2),
        copies=2,
        steps=4,
        restarts=2,
        min_norm_steps=8,
        queries=9,
    ),
    "generate": GenerateConfig(samples=10, chains=2),
}
FULL = EvaluateConfig(suite="full", sets=MADE, **GENTLE)
FEW = EvaluateConfig(suite="full", sets=("interp", "rot90"), **GENTLE)
ALL_SCORES = {"log_px", "max_py", "approx_mass", "refine", "refine_l2"} | {
    *("msp", "energy", "odin", "mahalanobis", "vim", "knn")
}


def checkerboard(n, generator):
    """Two classes, by the brightness of the left half; of each image and its other in `interpolations`, one of each."""
    rows = torch.arange(n)
    others = (2 * interpolations(rows[:, None, None, None].double()).flatten() - rows).long()
    labels, row = torch.zeros(n, dtype=torch.int64), 0
    for i in range(n):
        labels[row], row = i % 2, int(others[row])
    images = torch.randint(0, 40, (n, 1, 4, 4), generator=generator)
    images[:, :, :, :2] += (215 * labels)[:, None, None, None]
    return Split(images.to(torch.uint8), labels)


class Knowing(nn.Module):
    """It knows the data: log p(x) is high where the halves are flat, as no noise and no mixture is."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor([-0.84, 0.84]))

    def forward(self, x):
        left, right = x[:, 0, :, :2].flatten(1), x[:, 0, :, 2:].flatten(1)
        fit = -20 * ((left[:, None] - self.value[None, :, None]) ** 2).sum(2)
        return fit - 20 * ((right + 0.84) ** 2).sum(1)[:, None]


def network(seed=0, classes=2):
    """Sure of itself, and often wrong."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, classes)).requires_grad_(False).eval()


def trained(data):
    """Surer than it should be: it has learnt its few training images by heart."""
    net = network().requires_grad_(True)
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(60):
        images = to_float(data.train.images)
        nn.functional.cross_entropy(net(images), data.train.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.requires_grad_(False)


@pytest.fixture
def data(generator):
    splits = [checkerboard(n, generator) for n in (80, 40, BATCH + 20)]
    noisy = splits[2].labels.clone()
    noisy[::5] = 1 - noisy[::5]  # else a network that separates them would be right throughout
    flipped = Split(
        splits[1].images, splits[1].labels.roll(7) * (torch.arange(40) < 9) + splits[1].labels * (torch.arange(40) >= 9)
    )
    return DataSet("toy", splits[0], flipped, Split(splits[2].images, noisy), ("dark", "light"))


def run(net, data, settings=FULL, config=CONFIG):
    return evaluate(net, data, config, settings, compute_here(net, config, settings, World(), LIKE))


def test_the_fast_suite_finds_a_good_classifier_and_density_and_reports_every_figure(generator):
    split = checkerboard(60, generator)
    data, net = DataSet("toy", split, split, split, ("dark", "light")), Knowing().requires_grad_(False)
    report, _ = run(net, data, EvaluateConfig())
    metrics = report["metrics"]
    names = {f"ood/{s}/{score}/auroc" for s in ("interp", "uniform") for score in ("log_px", "max_py", "approx_mass")}
    calibration = ("ece", "ece_equal_mass", "mce", "ece_classwise", "brier", "nll")
    names |= {f"{part}/{key}" for part in ("test", "test_scaled") for key in calibration}
    assert set(metrics) == names | {"test/accuracy", "val/temperature"}
    assert metrics["test/accuracy"] == 1
    assert metrics["test/nll"] < 1e-3
    assert metrics["ood/uniform/log_px/auroc"] == 1  # in-distribution is positive, scores rise with it
    assert metrics["ood/interp/log_px/auroc"] == 1
    assert metrics["ood/interp/max_py/auroc"] > 0.9
    assert metrics["ood/uniform/approx_mass/auroc"] > 0.9
    validated = validate(net, split, EvaluateConfig(), World(), LIKE)
    assert validated == {key: metrics[key if key.startswith("ood/") else f"test/{key}"] for key in validated}
    assert report["ood"]["uniform"]["called_outside"] == [1, 1, 1]


def test_the_full_suite_measures_every_score_against_every_set_and_its_figures_are_those_of_the_outputs(data):
    report, measured = run(network(), data)
    assert set(report["ood"]) == set(MADE)
    assert set(report["left_out"]) == {"gen", "gen/buffer"}  # images of no known data, and no buffer
    for name, found in report["ood"].items():
        assert set(found["scores"]) == ALL_SCORES
        for score, figures in found["scores"].items():
            inside, outside = measured.scores["test"][score].numpy(), measured.scores[name][score].numpy()
            values, truth = np.concatenate([inside, outside]), np.repeat([1, 0], [len(inside), len(outside)])
            assert figures["auroc"][0] == pytest.approx(roc_auc_score(truth, values), abs=1e-12)
            assert figures["aupr_in"][0] == pytest.approx(average_precision_score(truth, values), abs=1e-12)
            assert figures["aupr_out"][0] == pytest.approx(average_precision_score(1 - truth, -values), abs=1e-12)
            for value, low, high in figures.values():
                assert low <= value <= high
            assert report["metrics"][f"ood/{name}/{score}/auroc"] == figures["auroc"][0]
            assert sum(report["histograms"][score]["counts"][name]) == len(outside)
            assert report["roc"][name][score]["fpr"][-1] == report["roc"][name][score]["tpr"][-1] == 1
    assert json.loads(json.dumps(report, allow_nan=False))["metrics"] == report["metrics"]


def test_temperature_and_threshold_are_of_the_validation_split_alone(data):
    report, measured = run(trained(data), data, EvaluateConfig())
    other = replace(data, test=Split(255 - data.test.images, data.test.labels.flip(0)))
    again, _ = run(trained(data), other, EvaluateConfig())
    assert again["temperature"] == report["temperature"]
    assert again["threshold"]["log_px"] == report["threshold"]["log_px"]
    assert again["test"] != report["test"]
    t = report["temperature"]["value"]
    assert t != 1
    assert report["temperature"]["reason"] == "fitted"
    scaled = confidence_bins(measured.logits["test"].double() / t, data.test.labels)
    assert report["test_scaled"]["ece"][0] == ece(scaled)
    accepted = measured.logits["validation"].logsumexp(dim=1) >= report["threshold"]["log_px"]
    assert accepted.double().mean() >= 0.95


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_parts_of_any_number_of_workers_add_up_to_the_same_bits(data, workers):
    net = network()
    subjects = prepare(net, data, CONFIG, FULL)
    done = Counter()
    alone = compute_here(net, CONFIG, FULL, World(), LIKE, lambda which, n: done.update({which: n}))(subjects)
    assert done == pytest.approx({which: len(subjects.images[which.images]) for which in alone}), (
        "progress ends at 100 %"
    )
    of_attacks_and_chains = {"attack/0", "attack/2", "distal", "fresh", "chains"}
    assert {which.what for which in alone} == set(passes.FORWARDS) | of_attacks_and_chains
    for which, whole in alone.items():
        images, labels = subjects.images[which.images], subjects.labels.get(which.images)
        parts = [
            run_pass(net, which, images, CONFIG, FULL, Part(rank, workers), LIKE, labels=labels)
            for rank in range(workers)
        ]
        assert torch.equal(sum(parts), whole), which


def test_attacks_through_a_refinement_take_the_memory_that_there_is(data, monkeypatch):
    """A GPU without room for second derivatives of all copies: the same figures but for rounding, the same progress."""
    refused, whole = [], refined.differentiable

    def cramped(through, energy, x):
        if through and len(x) > 3:
            refused.append(len(x))
            raise torch.OutOfMemoryError
        return whole(through, energy, x)

    net = network()
    settings = replace(FULL, attack=replace(FULL.attack, linf=(0.2,), l2=(1.0,), restarts=1, queries=3))
    subjects = prepare(net, data, CONFIG, settings)
    which = next(one for one in subjects.passes if one.what == "attack/2")
    images, labels, progress = subjects.images[which.images], subjects.labels[which.images], []
    arguments = net, which, images, CONFIG, settings, World(), LIKE
    free = run_pass(*arguments, labels=labels)
    monkeypatch.setattr(refined, "differentiable", cramped)
    tight = run_pass(*arguments, progress.append, labels=labels)
    assert len(refused) > 1
    assert sum(progress) == pytest.approx(len(images))
    parts = [robustness.split(rows, settings, 2, images[0].numel()) for rows in (free, tight)]
    assert torch.equal(parts[0]["wrong"], parts[1]["wrong"])
    for name in ("linf/pgd", "l2/pgd", "linf/fmn", "l2/ddn"):
        torch.testing.assert_close(parts[0][name], parts[1][name], rtol=0.05, atol=0.01)


def test_two_evaluations_are_equal_but_for_the_clock(data):
    (one, _), (other, _) = run(network(), data, FEW), run(network(), data, FEW)
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_outputs_come_back_from_the_disk_as_they_were(data, tmp_path):
    _, measured = run(network(), data, FEW)
    measured.save(tmp_path / "outputs.safetensors")
    again = Measured.load(tmp_path / "outputs.safetensors")
    assert again.outliers == measured.outliers
    assert torch.equal(again.logits["test"], measured.logits["test"])
    assert torch.equal(again.labels["validation"], measured.labels["validation"])
    for name, found in measured.scores.items():
        assert all(torch.equal(again.scores[name][score], value) for score, value in found.items())


def test_a_network_that_ends_in_no_linear_layer_is_compared_with_what_needs_none(data):
    report, _ = run(Knowing().requires_grad_(False), data)
    assert {"mahalanobis", "vim", "knn"} <= set(report["left_out"])
    assert set(report["ood"]["uniform"]["scores"]) == ALL_SCORES - set(report["left_out"])
    assert "linear layer" in report["left_out"]["vim"]


def test_too_few_training_images_leave_out_just_what_needs_them(data, generator):
    one_class = Split(data.train.images[:40], torch.zeros(40, dtype=torch.int64))
    report, _ = run(network(), replace(data, train=one_class), FEW)
    assert set(report["left_out"]) == {"mahalanobis", "knn", "gen", "gen/buffer"}
    assert "class 1" in report["left_out"]["mahalanobis"]
    assert "vim" in report["ood"]["interp"]["scores"]


def test_two_sets_of_one_name_are_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"evaluate\.sets"):
        run(network(), data, EvaluateConfig(suite="full", sets=("uniform", "uniform")))


def test_a_network_that_has_diverged_is_said_to_have(data):
    net = network()
    net[-1].bias.fill_(torch.nan)
    with pytest.raises(DivergedError):
        run(net, data, EvaluateConfig())
    with pytest.raises(DivergedError, match="logits are not finite for"):
        run(net, data)


def test_a_score_that_is_no_number_is_left_out_and_the_rest_is_measured(data):
    """At a step of 1 chains on so steep an energy leave every range."""
    report, _ = run(Knowing().requires_grad_(False), data)
    assert {"refine", "refine_l2"} <= set(report["left_out"])
    assert "not finite" in report["left_out"]["refine"]
    assert {"log_px", "approx_mass", "msp"} <= set(report["ood"]["uniform"]["scores"])


def test_against_itself_nothing_differs_and_against_another_the_difference_is_that_of_the_figures(data):
    one, other = (run(network(seed), data, FEW) for seed in (0, 3))
    for report in (one[0], other[0]):
        report["model"] = {"name": "a", "source": "a", "digest": "0"}
    for row in against(one, one)["rows"]:
        assert row["difference"] == ([0, None, None] if row["metric"] in BINNED else [0, 0, 0])
    rows = {(row["group"], row["metric"]): row for row in against(one, other)["rows"]}
    swapped = {(row["group"], row["metric"]): row for row in against(other, one)["rows"]}
    assert {group for group, _ in rows} == {"classification", "calibration", "after temperature", "ood", "robust"}
    assert len([metric for group, metric in rows if group == "ood"]) == 2 * len(ALL_SCORES)
    for key, row in rows.items():
        (a, *_), (b, *_) = row["values"]
        value, low, high = row["difference"]
        assert value == pytest.approx(a - b, abs=1e-9), key
        if key[1] in BINNED:  # biased by an amount of each model's own
            assert (low, high) == (None, None)
            continue
        assert low <= high
        assert np.allclose(swapped[key]["difference"], [-value, -high, -low], atol=1e-9), key
    assert rows["calibration", "ece"]["better"] == "lower"


def test_a_paired_difference_is_surer_than_two_intervals_where_models_err_alike(data):
    net = network()
    nearly = network()
    nearly[-1].bias.add_(torch.tensor([0.02, 0.0]))
    one, other = run(net, data, EvaluateConfig()), run(nearly, data, EvaluateConfig())
    for report in (one[0], other[0]):
        report["model"] = {"name": "a", "source": "a", "digest": "0"}
    row = next(r for r in against(one, other)["rows"] if (r["group"], r["metric"]) == ("calibration", "nll"))
    widths = [high - low for _, low, high in (*row["values"], row["difference"])]
    assert widths[2] < 0.2 * min(widths[:2])


def test_models_of_different_data_are_not_compared(data, generator):
    changed = replace(data, test=checkerboard(30, generator))
    one, other = run(network(), data, EvaluateConfig()), run(network(), changed, EvaluateConfig())
    with pytest.raises(ConfigError, match="different data"):
        against(one, other)


def test_what_is_undefined_is_none():
    assert plain(Interval(float("nan"), 0.0, 1.0)) == [None, 0.0, 1.0]


def test_passes_that_nobody_needs_are_not_made():
    assert passes.needed(False, ("interp",), {}) == [
        Pass("validation", "logits"),
        *(Pass(images, what) for images in ("test", "interp") for what in ("logits", "approx_mass")),
    ]
    without = passes.needed(True, ("interp",), dict.fromkeys(("odin", "vim"), "why"))
    assert {which.what for which in without} == {"logits", "approx_mass", "refinement"}
    assert ood.METRICS == ("auroc", "aupr_in", "aupr_out", "fpr95")


def test_the_full_suite_attacks_jem_0_and_jem_k_and_more_attack_never_raises_accuracy(data):
    report, measured = run(trained(data), data, FEW)
    section = report["robust"]
    assert section["n"] == 7
    assert section["counts"] == {
        "images": 7, "steps": 4, "restarts": 2, "min_norm_steps": 8, "queries": 9, "copies": 2
    }  # fmt: skip
    assert list(section["k"]) == ["0", "2"]
    for k, of_k in section["k"].items():
        prefix = "robust" if k == "0" else "robust_k2"
        names = {"linf": ["pgd", "fmn", "square"], "l2": ["pgd", "ddn", *(["cw"] if k == "0" else []), "square"]}
        for norm, found in of_k["norms"].items():
            assert list(found["accuracy"]) == [*names[norm], "worst"]
            for name, values in found["accuracy"].items():
                attacked = [i for i, value in enumerate(values) if value is not None]
                searched_once = k != "0" and name == "square"
                assert attacked == ([len(values) // 2] if searched_once else list(range(len(values))))
                metrics = [f"{prefix}/{norm}/{eps:g}/{name}/accuracy" for eps in found["eps"]]
                assert [i for i, key in enumerate(metrics) if key in report["metrics"]] == attacked
                shares = [values[i][0] for i in attacked]
                assert shares == sorted(shares, reverse=True)
                for i, share in zip(attacked, shares, strict=True):
                    assert found["accuracy"]["worst"][i][0] <= share <= of_k["clean"][0]
                    eps = found["eps"][i]
                    assert report["metrics"][metrics[i]] == share
                    norms = [math.inf if v is None else v for v in found["found"][name]]
                    assert share == sum(v > eps for v in norms) / 7
            nearest = measured.attacked[f"{k}/{norm}/adversarial"].view(7, 1, 4, 4) - measured.attacked["images"]
            worst = torch.tensor([math.inf if v is None else v for v in found["found"]["worst"]])
            there = worst.isfinite()
            torch.testing.assert_close(norm_of(nearest, norm)[there].float(), worst[there], atol=1e-5, rtol=1e-5)
        assert any(of_k["norms"]["l2"]["found"]["ddn"])  # a norm above 0: something was found


def test_images_that_are_wrong_from_the_start_count_as_broken(data):
    report, measured = run(trained(data), data, FEW)
    wrong = (measured.attacked["0/wrong"] > 0).tolist()
    assert 0 < sum(wrong) < 7
    assert report["robust"]["k"]["0"]["clean"][0] == 1 - sum(wrong) / 7
    found = report["robust"]["k"]["0"]["norms"]["linf"]["found"]["worst"]
    assert [v == 0 for v in found] == wrong


def test_features_of_samples_are_computed_where_the_network_is(data, monkeypatch):
    asked = []

    def extractor(*arguments):
        asked.append(arguments[3])
        raise ConfigError([Problem("evaluate.generate.inception", "enough")])

    monkeypatch.setattr("jem.evaluate.sampled.extractor_for", extractor)
    net = trained(data)
    compute = compute_here(net, CONFIG, FEW, World(), LIKE)
    evaluate(net, data, CONFIG, FEW, compute, device=torch.device("cuda:1"))
    assert asked == [torch.device("cuda:1")]


def test_samples_are_of_the_prior_and_of_the_buffer_and_a_classifier_has_none(data, generator):
    buffer = torch.rand(30, 1, 4, 4, generator=generator) * 2 - 1
    net = trained(data)
    report, measured = evaluate(net, data, CONFIG, FEW, compute_here(net, CONFIG, FEW, World(), LIKE), lambda: buffer)
    assert list(measured.samples) == ["fresh", "buffer"]
    assert torch.equal(measured.samples["buffer"], to_bytes(buffer[at_random(30, 10)]))
    assert "no feature extractor" in report["left_out"]["gen"]  # of images of no known data set
    assert report["chains"]["length"] == 5  # 3 steps, restarting with .6
    assert report["chains"]["steps"][-1] == 500
    assert report["metrics"]["chains/100x/energy"] == report["chains"]["energy"][-1][0]
    for name in ("samples_fresh", "neighbours_fresh", "samples_buffer", "neighbours_buffer", "adversarials", "distal"):
        packed = report["grids"][name]
        assert len(base64.b64decode(packed["pixels"])) == math.prod(packed["shape"])
    shown = np.frombuffer(base64.b64decode(report["grids"]["samples_buffer"]["pixels"]), np.uint8)
    assert np.array_equal(shown, measured.samples["buffer"].numpy().ravel())
    plain_classifier = small(
        data__name="parquet",
        data__root="/nowhere",
        data__crop_padding=0,
        objective__p_x_weight=0.0,
        replay__prior="gaussian",  # which nothing starts from
    )
    report, measured = run(net, data, FEW, plain_classifier)
    assert list(report["robust"]["k"]) == ["0"]
    assert not {"gen", "chains"} & set(report)
    assert {"gen", "chains", "robust_k"} <= set(report["left_out"])
    assert measured.samples == {}


@pytest.mark.parametrize(("total", "most"), [(2000, 1000), (10_000, 1000), (1000, 100)])
def test_chains_that_are_looked_at_are_of_all_classes_though_these_come_in_turns(total, most):
    """As ReplayBuffer.labels deals them; every second or tenth would be of 5 classes or of one."""
    rows = at_random(total, most)
    assert len(rows.unique()) == len(rows) == most
    assert torch.equal(rows, at_random(total, most))
    found = torch.bincount(rows % 10, minlength=10)
    assert abs(found - most / 10).max() < 4 * (most * 0.1 * 0.9) ** 0.5
    assert torch.equal(at_random(most, total), torch.arange(most)), "all there are"


@pytest.mark.parametrize("order", ["in turns", "sorted", "shuffled"])
def test_the_images_that_are_attacked_are_of_all_classes_however_these_come(order, generator):
    labels = torch.arange(1000) % 10
    labels = {
        "in turns": labels,
        "sorted": labels.sort()[0],
        "shuffled": labels[torch.randperm(1000, generator=generator)],
    }[order]
    rows = fairly(labels, 100)
    assert len(rows.unique()) == 100
    assert torch.equal(rows, fairly(labels, 100))
    counts = labels[rows].bincount(minlength=10)
    assert counts.min() >= 2
    assert counts.max() <= 22
    assert torch.equal(rows, evenly(1000, 100)) == (order != "in turns")


def test_a_buffer_without_a_single_number_is_left_out(data):
    net = trained(data)
    lost = torch.full((20, 1, 4, 4), math.nan)
    report, measured = evaluate(net, data, CONFIG, FEW, compute_here(net, CONFIG, FEW, World(), LIKE), lambda: lost)
    assert report["left_out"]["gen/buffer"] == "none of the 20 chains of the replay buffer is a number"
    assert list(measured.samples) == ["fresh"]


def test_a_buffer_is_said_to_be_missing_where_there_is_none(data):
    report, measured = run(network(), data, FEW)
    assert "a run's folder or checkpoint has one" in report["left_out"]["gen/buffer"]
    assert list(measured.samples) == ["fresh"]


def test_each_models_accuracy_on_the_others_adversarials_is_part_of_a_comparison(data):
    nets = trained(data), network(3)
    measured = [run(net, data, FEW)[1] for net in nets]
    found = transfer((nets[0], nets[1]), (measured[0], measured[1]))
    assert {norm: section["eps"] for norm, section in found.items()} == {"linf": [0.05, 0.2], "l2": [0.3, 1.0]}
    made_on_b = measured[1].attacked["0/l2/transfer/1"].view(7, 1, 4, 4)
    right = nets[0](2 * made_on_b - 1).argmax(dim=1) == measured[1].attacked["labels"]
    assert found["l2"]["b_on_a"][1][0] == right.double().mean().item()
    own = transfer((nets[0], nets[0]), (measured[0], measured[0]))
    assert own["l2"]["b_on_a"] == own["l2"]["a_on_b"]
    assert dict(transfer_metrics(found))["robust/l2/1/transfer/accuracy"] == found["l2"]["b_on_a"][1][0]


class Stairs(nn.Module):
    """A linear net that sees steps of .02: right and wrong as the linear one, with a gradient of 0 everywhere."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x / 0.02).round() * 0.02) + 0 * x.sum()


def test_hidden_gradients_are_suspected_where_random_search_finds_what_no_gradient_does(data):
    settings = replace(FEW, attack=replace(FEW.attack, images=40, linf=(0.3, 0.45), refine=(0,), queries=150))
    open_net = trained(data)
    for net, ok in ((open_net, True), (Stairs(open_net), False)):
        report, _ = run(net, data, settings)
        masking = report["robust"]["k"]["0"]["masking"]
        assert (masking["black_box"]["linf"]["ok"] and masking["larger_budget"]["ok"]) is ok
        assert masking["black_box"]["linf"]["by_square_alone"] > 5 or ok


def test_distal_adversarials_are_images_that_the_model_is_sure_of(data):
    net = trained(data)
    rows = distal(net, torch.rand(2, 1, 4, 4) * 2 - 1, torch.arange(2))
    images = rows[:, 2:].view(2, 1, 4, 4)
    assert (rows[:, 0] > 0.9).all()
    assert images.abs().max() <= 1
    torch.testing.assert_close(net(images).softmax(dim=1).diag(), rows[:, 0])
