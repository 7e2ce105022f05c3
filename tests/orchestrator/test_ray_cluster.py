"""What is decided before Ray is asked for anything."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from jem.errors import ConfigError
from orchestrator import ray_cluster
from orchestrator.config import load_run_config
from orchestrator.ray_cluster import Cluster, cores, patience, threads, use_gpu


@pytest.mark.parametrize(("text", "expected"), [("150000 100000", 1), ("200000 100000", 2), ("max 100000", 64)])
def test_a_containers_quota_limits_the_cores(monkeypatch, text, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    assert cores() == expected


@pytest.mark.parametrize(
    ("said", "workers_here", "expected"),
    [
        (None, 1, 8),
        (None, 3, 2),
        (None, 20, 1),
        ("1", 2, 1),
        ("3", 2, 3),
        ("16", 2, 4),
        ("", 2, 4),
        ("0", 2, 4),
        ("x", 2, 4),
    ],
)
def test_workers_share_the_cores_and_take_no_more_than_omp_num_threads_says(monkeypatch, said, workers_here, expected):
    monkeypatch.setattr(ray_cluster, "cores", lambda: 8)
    assert threads(said, workers_here) == expected


def test_each_worker_gets_a_gpu_where_there_are_enough():
    config = load_run_config("digits", ["workers=2"])
    assert use_gpu(config, Cluster(private=True, cpus=8, gpus=2))
    assert not use_gpu(config, Cluster(private=True, cpus=8, gpus=1))
    assert not use_gpu(load_run_config("digits", ["device=cpu"]), Cluster(private=True, cpus=8, gpus=8))


def test_an_elastic_run_needs_what_its_fewest_workers_need(capsys):
    config = load_run_config("digits", ["workers=2..8"])
    assert use_gpu(config, Cluster(private=True, cpus=8, gpus=2))
    assert not use_gpu(config, Cluster(private=True, cpus=8, gpus=1))
    ray_cluster._check(config, Cluster(private=False, cpus=2, gpus=2))
    assert capsys.readouterr().err == ""
    ray_cluster._check(config, Cluster(private=False, cpus=1, gpus=0))
    assert "workers=2..8, the cluster has 1 CPUs at present: waiting for more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "private", "gpus", "told"),
    [("auto", False, 0, True), ("auto", False, 1, False), ("auto", True, 0, False), ("cpu", False, 0, False)],
)
def test_a_cluster_without_gpus_at_present_is_said_to_train_on_cpus(capsys, device, private, gpus, told):
    config = load_run_config("digits", ["workers=1", f"device={device}"])
    ray_cluster.tell_of_gpus(config, Cluster(private=private, cpus=4, gpus=gpus))
    assert ("device=cuda waits for GPUs" in capsys.readouterr().err) == told


@pytest.mark.parametrize(("private", "gpus"), [(True, 1), (False, 3), (True, 4), (True, 0)])
def test_gpus_too_few_for_the_workers_are_told_of(capsys, private, gpus):
    config = load_run_config("digits", ["workers=4"])
    ray_cluster.tell_of_gpus(config, Cluster(private=private, cpus=4, gpus=gpus))
    told = capsys.readouterr().err
    if 0 < gpus < 4:
        assert told == (
            f"{gpus} GPU{'s' * (gpus > 1)} for workers=4: it trains on CPUs; workers={gpus} trains on what there is\n"
        )
    else:
        assert told == ""


@pytest.mark.parametrize(("usable", "expected"), [(True, 2), (False, 0)])
def test_gpus_that_ray_counts_and_torch_cannot_use_are_none(monkeypatch, capsys, usable, expected):
    """An NVIDIA driver that is too old for this torch, or Apple's GPU, which Ray counts as one."""
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 2.0})
    monkeypatch.setattr(ray_cluster, "torch_sees_gpus", lambda: usable)
    with ray_cluster.ray_session(2) as cluster:
        assert cluster.gpus == expected
    assert ("PyTorch can use none" in capsys.readouterr().err) is not usable


def test_a_token_that_cannot_be_changed_ends_no_command(monkeypatch, tmp_path):
    import ray

    def refuse(*_):
        raise PermissionError

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(ray_cluster, "TOKEN", SimpleNamespace(chmod=refuse))
    with ray_cluster.ray_session(2) as cluster:
        assert cluster.cpus == 4


def test_how_long_ray_waits_follows_the_configuration():
    fixed = patience(load_run_config("digits", ["workers=2", "recovery.hang_timeout=45"]))
    assert fixed == {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "45.0"}
    elastic = patience(load_run_config("digits", ["workers=1..2"]))
    assert elastic["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "20", "a lost node is not waited for"


def test_missing_gpus_are_an_error_here_and_waited_for_on_a_cluster(capsys):
    config = load_run_config("digits", ["workers=2", "device=cuda"])
    with pytest.raises(ConfigError, match="workers: is 2, but there are 1 GPUs"):
        ray_cluster._check(config, Cluster(private=True, cpus=8, gpus=1))
    ray_cluster._check(config, Cluster(private=False, cpus=8, gpus=1))
    assert "the cluster has 1 GPUs at present: waiting for more" in capsys.readouterr().err
