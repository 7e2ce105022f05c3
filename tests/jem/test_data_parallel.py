"""Ranks that share a batch do what one process would: several gloo processes against one."""

import contextlib
import functools
import gc
import math
import time
import weakref
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from spawn import run_ranks
from torch.distributed import set_timeout as set_group_timeout
from torch.nn.parallel import DistributedDataParallel
from toys import small, tensors_of

from jem.config import EvaluateConfig
from jem.data.batches import Batch
from jem.data.splits import DataSet, Split
from jem.errors import DataError, JEMError
from jem.evaluate import suite
from jem.evaluate.evaluate import BATCH, over_batches
from jem.evaluate.passes import Pass
from jem.evaluate.suite import Subjects
from jem.prior import Prior
from jem.replay import ReplayBuffer
from jem.train import prepare_first_step, sample, start, train_step
from jem.world import World

SHAPE, CLASSES, STEPS, SIZES = (1, 8, 8), 3, 3, (2, 4)
HERE = torch.device("cpu")

# No noise, no restart, and as many chains as images: each step moves all chains, whoever holds them.
EXACT = {
    "precision": "float64",
    "sgld__noise_scale": 0.0,
    "replay__reinit_prob": 0.0,
    "optimizer__ema_decay": 0.9,
    "sgld__step_size": 5.0,
}
CASES = {
    "batch 8": {"n": 8, **EXACT},
    "batch 7": {"n": 7, **EXACT},
    "an image a rank": {"n": 4, **EXACT},
    "convolutions": {"n": 7, **EXACT, "model__name": "small_conv", "model__channels": [3, 5]},
    "p(x, y), class-conditional, L2": {
        "n": 7,
        **EXACT,
        "objective__p_x_y_weight": 0.5,
        "objective__energy_l2": 0.1,
        "sgld__conditional": True,
    },
    "2 labelled": {"n": 7, "labelled": 2, **EXACT},  # of 4 ranks some have none
    "classifier, 1 labelled": {"n": 7, "labelled": 1, **EXACT, "objective__p_x_weight": 0.0},
    "PYLD, a schedule, chains that adapt": {
        "n": 7,
        **EXACT,
        "model__name": "small_conv",
        "model__channels": [3, 5],
        "sgld__steps": 20,  # 5 % more of which is a step more
        "sgld__max_steps": 40,
        "sgld__inner_steps": 2,
        "sgld__final_step_size": 0.5,
    },
    "SGD, clipped": {"n": 7, **EXACT, "optimizer__name": "sgd", "optimizer__clip_norm": 0.1},
    "p(x) and p(x, y) not augmented": {
        "n": 7,
        **EXACT,
        "data__augment_p_x": False,
        "objective__p_x_y_weight": 0.5,
        "sgld__conditional": True,
    },
    "KL": {"n": 7, **EXACT, "objective__kl_weight": 0.3},
    "contrastive p(x|y), 3 labelled": {
        "n": 7,
        "labelled": 3,
        **EXACT,
        "objective__p_x_weight": 0.0,
        "objective__p_x_given_y_weight": 0.5,
    },
    "DAT and the approximate mass": {
        "n": 7,
        **EXACT,
        "sgld__normalize_gradient": True,
        "objective__p_x_loss": "bce",
        "objective__mass_weight": 0.3,
    },
    "KL, an image a rank, class-conditional, convolutions, SAM": {
        "n": 4,
        **EXACT,
        **{"model__name": "small_conv", "model__channels": [3, 5], "model__activation": "silu"},
        **{"objective__kl_weight": 0.3, "sgld__conditional": True, "optimizer__sam_rho": 0.3},
    },
    "SAM": {"n": 7, **EXACT, "optimizer__sam_rho": 0.3},
    "ASAM, 2 labelled": {"n": 7, "labelled": 2, **EXACT, "optimizer__sam_rho": 0.3, "optimizer__sam_adaptive": True},
}
FEW = {"n": 7, **EXACT, "objective__kl_weight": 0.3, "objective__kl_samples": 2}  # of 4 ranks some have none
BATCH_NORM = {"model__name": "small_conv", "model__channels": [3, 5], "model__norm": "batch"}
GUARDS = {
    "adam, first update": {"poison": math.nan, "poison_at": 0},
    "adam, later": {"poison": math.inf, "poison_at": 2},
    "sgd, first update": {"poison": math.nan, "poison_at": 0, "optimizer__name": "sgd"},
    "sgd, later": {"poison": math.nan, "poison_at": 2, "optimizer__name": "sgd"},
    "SAM": {"poison": math.nan, "poison_at": 2, "optimizer__sam_rho": 0.3},
}
FIGURES = (
    *("chain_grad_norm", "reinit_share", "lost_chains", "grad_norm"),
    *("chain_saturation", "chain_contrast", "data_contrast"),
)


def whole_batch(n, labelled, dtype, step=0, augment_p_x=True):
    random = torch.Generator().manual_seed(step)
    images = torch.randn(n, *SHAPE, generator=random, dtype=torch.float64).to(dtype)
    labels = torch.randint(CLASSES, (n,), generator=random)
    frequent = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    if not augment_p_x:
        return Batch(images, labels, images + 0.1, labels, n, n, frequent)
    if labelled is None:
        return Batch(images, labels, None, None, n, n, frequent)
    return Batch(images, None, images[:labelled] + 0.1, labels[:labelled], n, labelled)


def part(batch, world):
    def cut(tensor):
        return None if tensor is None else tensor[world.share(len(tensor))]

    tensors = (batch.images, batch.labels, batch.labelled_images, batch.labelled_labels)
    return Batch(*map(cut, tensors), batch.n_global, batch.n_labelled_global, batch.class_shares)


def begin(n, world, **settings):
    """State and network for the step; the chains are rows of one buffer, however many share it."""
    config = small(batch_size=n, replay__capacity=n, **settings)
    state = start(config, SHAPE, CLASSES, world, HERE)
    if state.replay is not None:
        random = torch.Generator().manual_seed(9)
        alone = ReplayBuffer.start(Prior(config.replay, SHAPE), CLASSES, World(), random)
        state.replay.chains = alone.chains[world.share(n)].to(state.replay.chains.dtype)
    wrapped = None
    if world.size > 1:
        wrapped = DistributedDataParallel(state.network, broadcast_buffers=False, gradient_as_bucket_view=True)
    return config, state, wrapped


def several_steps(world, n, labelled=None, **settings):
    """For each step: gradients, what every rank must hold alike, chains, figures."""
    config, state, wrapped = begin(n, world, **settings)
    seen = []
    for step in range(STEPS):
        dtype = torch.float64 if config.precision == "float64" else torch.float32
        batch = part(whole_batch(n, labelled, dtype, step, config.data.augment_p_x), world)
        info = train_step(state, batch, config, world, wrapped)
        gradients = [p.grad.clone() for p in state.network.parameters()]
        chains = None if state.replay is None else state.replay.chains.clone()
        figures = {name: getattr(info, name) for name in FIGURES} | info.loss._asdict()
        seen.append({"gradients": gradients, "state": tensors_of(state), "chains": chains, "figures": figures})
    return seen


@functools.cache
def one_process(case):
    """What the ranks are held against: the case on the whole batch, computed once for all sizes."""
    return several_steps(World(), **CASES[case])


def poisoned_steps(world, poison, poison_at, **settings):
    """Two states around a step in which one rank's batch holds a value that is not finite, and what came of it."""
    config, state, wrapped = begin(8, world, **settings, optimizer__ema_decay=0.5)
    for step in range(poison_at + 2):
        batch = part(whole_batch(8, None, torch.float32, step), world)
        if step == poison_at and world.rank == world.size - 1:
            batch.images[0, 0, 0, 0] = poison
        before = tensors_of(state)
        info = train_step(state, batch, config, world, wrapped)
        if step == poison_at:
            around = (before, tensors_of(state), bool(info.skipped))
    return {"around": around, "then": (before, tensors_of(state), bool(info.skipped))}


def calls_of_collectives(function):
    """The names of collectives that `function` ran, as the profiler saw them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return [event.name for event in profile.events() if "gloo:" in event.name or "c10d::" in event.name]


def rank_alone_samples(world):
    config, state, wrapped = begin(8, world, sgld__steps=4)
    batch = part(whole_batch(8, None, torch.float32), world)
    names = calls_of_collectives(lambda: sample(state, config, batch.images, 8)) if world.rank == 0 else []
    stepping = calls_of_collectives(lambda: train_step(state, batch, config, world, wrapped))
    return {"sampling": names, "stepping": stepping}


def act_norm(world):
    _, state, _ = begin(8, world, model__name="small_conv", model__channels=[3, 5], model__norm="act")
    prepare_first_step(state, whole_batch(8, None, torch.float32).images)
    return tensors_of(state)


def spoilt_evaluation(world):
    """What each rank was told of a batch that one of them cannot compute, and of sets that are not everywhere."""

    def function(x):
        if x.flatten()[0] == 1:  # the second batch: of rank 1
            raise JEMError("the gradient is not finite")
        return x.flatten(1)

    told = []
    images = torch.arange(3.0).repeat_interleave(BATCH)[:, None, None, None]
    with pytest.raises(JEMError) as raised:
        over_batches(function, images, EvaluateConfig(), world, torch.zeros(()), "spoilt")
    told.append(str(raised.value))

    def other(x):
        if x.flatten()[0] == 1:
            raise ValueError("singular")
        return x.flatten(1)

    with pytest.raises((ValueError, RuntimeError)) as raised:
        over_batches(other, images, EvaluateConfig(), world, torch.zeros(()), "spoilt")
    told.append(f"{type(raised.value).__name__}: {raised.value}")

    def prepared(*_):
        return Subjects({}, {}, [Pass("test", "logits"), *[Pass("textures", "logits")] * (world.rank == 0)], {})

    split = Split(torch.zeros(2, *SHAPE, dtype=torch.uint8), torch.arange(2))
    data = DataSet("toy", split, split, split, ("dark", "light"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "prepare", prepared)
        with pytest.raises(DataError) as raised:
            suite.evaluate(None, data, small(), EvaluateConfig(), lambda _: pytest.fail("computed"), world=world)
    told.append(str(raised.value))

    class Damaged(Split):
        def part(self):
            if world.rank == 1:
                raise DataError("a part of the images cannot be read")
            return self

    data = replace(data, train=Damaged(split.images, split.labels))
    with pytest.raises(DataError) as raised:
        suite.evaluate(None, data, small(), EvaluateConfig(), lambda _: pytest.fail("computed"), world=world)
    return [*told, str(raised.value)]


def late_rank(world):
    """What a rank is told that comes later than the group would have waited."""
    set_group_timeout(timedelta(seconds=0.5))
    world.be_patient()
    if world.rank == 1:
        time.sleep(1.5)
    return world.gather(world.rank)


def on_rank(world):
    """Everything below, in one go: starting processes is what costs."""
    return {
        "cases": {name: several_steps(world, **case) for name, case in CASES.items()},
        "batch norm": several_steps(world, 8, **EXACT, **BATCH_NORM),
        "batch norm, SAM, KL": several_steps(
            world, 8, **EXACT, **BATCH_NORM, optimizer__sam_rho=0.3, objective__kl_weight=0.3
        ),
        "KL of 2 chains": several_steps(world, **FEW),
        "guards": {key: poisoned_steps(world, **case, **BATCH_NORM) for key, case in GUARDS.items()},
        "collectives": rank_alone_samples(world),
        "act norm": act_norm(world),
        "spoilt": spoilt_evaluation(world),
        "late": late_rank(world),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(on_rank, SIZES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("size", SIZES)
def test_what_one_rank_cannot_evaluate_ends_all_of_them_with_the_reason(ranks, size):
    for number, rank in enumerate(ranks[size]):
        broken, odd, unequal, damaged = rank["spoilt"]
        assert odd == ("ValueError: singular" if number == 1 else "RuntimeError: on another rank: ValueError: singular")
        assert broken == "the gradient is not finite"
        assert unequal.startswith("evaluate.sets: not all workers' machines have textures: bring it to all")
        assert damaged == "a part of the images cannot be read"


@pytest.mark.parametrize("size", SIZES)
def test_ranks_that_are_patient_wait_for_one_that_is_late(ranks, size):
    assert [rank["late"] for rank in ranks[size]] == [[*range(size)]] * size


def test_an_error_that_all_are_told_of_keeps_nothing_alive():
    held = []

    class Batch:
        """Gigabytes, on a GPU."""

    def fail():
        batch = Batch()
        held.append(weakref.ref(batch))
        raise RuntimeError("out of memory")

    gc.disable()
    try:
        with contextlib.suppress(RuntimeError):
            World().together(fail)
        assert held[0]() is None
    finally:
        gc.enable()


def sorted_rows(chains):
    return chains.flatten(1)[chains.flatten(1)[:, 0].argsort()]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_weights_and_chains_are_those_of_one_process_on_the_whole_batch(ranks, size, case):
    alone = one_process(case)
    for step in range(STEPS):
        parts = [rank["cases"][case][step] for rank in ranks[size]]
        for mine in parts:
            torch.testing.assert_close(mine["gradients"], alone[step]["gradients"], atol=1e-10, rtol=0)
            torch.testing.assert_close(mine["state"], alone[step]["state"], atol=1e-9, rtol=0)
        assert max(g.abs().max() for g in alone[step]["gradients"]) > 1e-3
        if alone[step]["chains"] is not None:
            together = torch.cat([mine["chains"] for mine in parts])
            torch.testing.assert_close(sorted_rows(together), sorted_rows(alone[step]["chains"]), atol=1e-9, rtol=0)
        for name, figure in alone[step]["figures"].items():
            summed = sum(mine["figures"][name] for mine in parts)
            torch.testing.assert_close(summed, figure, atol=1e-7, rtol=0, msg=name)


@pytest.mark.parametrize("case", [*CASES, "batch norm", "batch norm, SAM, KL", "KL of 2 chains"])
@pytest.mark.parametrize("size", SIZES)
def test_weights_moments_averages_and_buffers_are_bit_equal_on_all_ranks_after_every_step(ranks, size, case):
    runs = [rank["cases"][case] if case in CASES else rank[case] for rank in ranks[size]]
    for step in range(STEPS):
        first = runs[0][step]["state"]
        for other in runs[1:]:
            assert all(torch.equal(first[key], value) for key, value in other[step]["state"].items())
            assert first.keys() == other[step]["state"].keys()
    assert not all(torch.equal(runs[0][0]["state"][key], value) for key, value in first.items())  # they do move


@pytest.mark.parametrize("size", [2, 4])
def test_batch_norms_running_statistics_are_the_means_of_the_ranks(ranks, size):
    """Else exempt from equality with one process; but a linear layer's mean over equal shares is that of all."""
    alone = several_steps(World(), 8, **EXACT, **BATCH_NORM)[0]["state"]
    got = ranks[size][0]["batch norm"][0]["state"]
    torch.testing.assert_close(got["network 1.running_mean"], alone["network 1.running_mean"], atol=1e-12, rtol=0)
    assert got["network 1.running_mean"].abs().max() > 1e-3
    assert not torch.equal(got["network 1.running_var"], alone["network 1.running_var"])


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("size", SIZES)
def test_a_non_finite_gradient_on_one_rank_changes_nothing_on_any_and_training_goes_on(ranks, size, guard):
    for rank in ranks[size]:
        before, after, skipped = rank["guards"][guard]["around"]
        assert skipped
        assert {key: torch.equal(value, after[key]) for key, value in before.items()} == dict.fromkeys(before, True)
        before, after, skipped = rank["guards"][guard]["then"]
        assert not skipped
        moved = {key.split()[0] for key, value in before.items() if not torch.equal(value, after[key])}
        assert moved >= {"network", "average"}
        first = ranks[size][0]["guards"][guard]["then"][1]
        assert all(value.isfinite().all() and torch.equal(value, first[key]) for key, value in after.items())


@pytest.mark.parametrize("size", SIZES)
def test_sampling_calls_no_collective_and_a_step_reduces_gradients_once(ranks, size):
    """Rank 0 samples while the others do not: had it called one, it would have met another's."""
    assert ranks[size][0]["collectives"]["sampling"] == []
    for rank in ranks[size]:
        assert rank["collectives"]["stepping"].count("gloo:all_reduce") == 1


def test_act_norm_starts_the_same_in_any_world(ranks):
    alone = act_norm(World())
    for size in SIZES:
        for rank in ranks[size]:
            assert all(torch.equal(value, rank["act norm"][key]) for key, value in alone.items())
