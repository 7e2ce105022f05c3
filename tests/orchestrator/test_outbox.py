from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.outbox import Artifact, Image, Model, Outbox, Point, Tags, legal_name


def metrics(step, **values):
    return {"time": 1000 + step, "kind": "metrics", "step": step, "metrics": values or {"loss": float(step)}}


def event(kind, step=None, **fields):
    return {"time": 0, "kind": kind, **({} if step is None else {"step": step}), **fields}


def feed(outbox, *events):
    return [item for e in events for item in outbox.feed(e)]


def steps(items):
    return [item.step for item in items if isinstance(item, Point)]


def tags(items):
    return {key: value for item in items if isinstance(item, Tags) for key, value in item.tags.items()}


def test_points_wait_for_the_checkpoint_that_commits_them():
    outbox = Outbox()
    assert feed(outbox, metrics(1), metrics(2)) == []
    assert feed(outbox, event("checkpoint", 2)) == [Point("loss", 1.0, 1001, 1), Point("loss", 2.0, 1002, 2)]
    assert feed(outbox, event("checkpoint", 2)) == []


def test_a_checkpoint_that_is_committed_late_does_not_commit_later_steps():
    outbox = Outbox()
    assert steps(feed(outbox, metrics(1), metrics(2), metrics(3), event("checkpoint", 2))) == [1, 2]
    assert steps(feed(outbox, event("attempt", 2))) == []
    assert steps(feed(outbox, metrics(3), event("checkpoint", 3))) == [3]


def test_what_waits_is_dropped_when_it_will_be_run_again():
    outbox = Outbox()
    sent = feed(outbox, metrics(1), event("checkpoint", 1), metrics(2), event("attempt", 1, attempt=2), metrics(2))
    assert steps(sent) == [1]
    assert "rewritten" not in tags(sent)
    assert steps(feed(outbox, event("checkpoint", 2))) == [2]


def test_steps_behind_sent_points_are_not_sent_again_and_that_is_said():
    outbox = Outbox()
    feed(outbox, *map(metrics, range(1, 11)), event("checkpoint", 10))
    back = feed(outbox, event("attempt", 4, attempt=2))
    assert tags(back)["rewritten"] == "5-10"
    assert steps(feed(outbox, *map(metrics, range(5, 13)), event("checkpoint", 12))) == [11, 12]
    assert tags(feed(outbox, event("attempt", 6, attempt=3)))["rewritten"] == "5-10,7-12"


def test_the_end_of_an_attempt_commits_all_that_it_did():
    outbox = Outbox()
    sent = feed(outbox, metrics(1), event("checkpoint", 1), metrics(2), event("end", status="failed"))
    assert steps(sent) == [1, 2]
    assert outbox.ended
    assert outbox.status == "failed"
    assert tags(feed(outbox, event("attempt", 1, attempt=2)))["rewritten"] == "2-2"
    assert not outbox.ended


def test_each_metric_and_each_series_of_images_has_its_own_high_water_mark():
    outbox = Outbox()
    feed(outbox, metrics(5, a=1.0), event("checkpoint", 5))
    image = {"time": 7, "kind": "image", "step": 5, "key": "samples", "path": "samples/5.png"}
    sent = feed(outbox, metrics(5, b=1.0), image, image, event("checkpoint", 5))
    assert sent == [Point("b", 1.0, 1005, 5), Image("samples", "samples/5.png", 7, 5)]


def test_every_attempt_is_visible_with_its_world_size():
    outbox = Outbox()
    feed(outbox, event("attempt", 0, attempt=1, workers=2))
    sent = feed(outbox, event("attempt", 0, attempt=2, workers=1))
    assert tags(sent)["attempts"] == "1: from step 0 workers=2; 2: from step 0 workers=1"


def test_files_and_tags_go_out_at_once():
    sent = feed(
        Outbox(), event("artifact", path="a.csv"), event("tags", tags={"device": "cpu"}), event("note", text="")
    )
    assert sent == [Artifact("a.csv"), Tags({"device": "cpu"})]


def test_a_final_model_goes_out_at_once_with_the_points_that_it_was_evaluated_on():
    model = event("model", 5, path="models/ab", digest="abcd", name="jem-digits", champion="nll")
    before = {"test/nll": 0.9, "val/nll": 0.8}
    first = metrics(5, **{"train/loss": 1.0, "val/nll": 0.5})
    again = metrics(5, **{"test/nll": 0.4}) | {"time": 2000}
    sent = feed(Outbox(), metrics(4, **before), first, again, model)
    points = {Point("val/nll", 0.5, 1005, 5), Point("test/nll", 0.4, 2000, 5)}
    assert [(m.path, m.step, m.name, m.champion, m.digest, set(m.metrics)) for m in sent] == [
        ("models/ab", 5, "jem-digits", "nll", "abcd", points)
    ]
    assert isinstance(sent[0], Model)


def test_what_the_run_has_from_a_lost_log_is_not_sent_again():
    outbox = Outbox(floor={"loss": 3})
    sent = feed(outbox, *map(metrics, range(1, 6)), event("checkpoint", 5))
    assert steps(sent) == [4, 5]
    assert "rewritten" not in tags(feed(outbox, event("attempt", 5)))


def test_a_value_that_is_no_number_is_left_out():
    sent = feed(Outbox(), metrics(1, a=None, b="x", c=True, d=2), event("checkpoint", 1))
    assert [(p.key, p.value) for p in sent] == [("c", 1.0), ("d", 2.0)]


@pytest.mark.parametrize(
    ("name", "legal"),
    [("train/loss", "train/loss"), ("fpr@95", "fpr_95"), ("/a//b", "a/b"), ("../x", "x"), ("a/.", "a"), ("/", "_")],
)
def test_names_are_made_legal_for_mlflow(name, legal):
    assert legal_name(name) == legal


crash_or_train = st.lists(st.tuples(st.integers(1, 8), st.booleans(), st.integers(0, 3)), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(history=crash_or_train, ended=st.booleans())
def test_after_any_history_every_step_is_sent_once(history, ended):
    """`history`: stretches of n steps, each with or without a checkpoint, then a restart some checkpoints back."""
    outbox, sent, checkpoints, step = Outbox(), [], [0], 0
    for number, (n, committed, back) in enumerate(history, start=1):
        sent += feed(outbox, event("attempt", step, attempt=number))
        for _ in range(n):
            step += 1
            sent += feed(outbox, metrics(step))
        if committed:
            checkpoints.append(step)
            sent += feed(outbox, event("checkpoint", step))
        elif ended:
            sent += feed(outbox, event("end", status="failed"))
        del checkpoints[len(checkpoints) - min(back, len(checkpoints) - 1) :]
        last, step = step, checkpoints[-1]
    sent += feed(outbox, event("end", status="finished"))
    assert sorted(steps(sent)) == list(range(1, max(steps(sent)) + 1))
    assert max(steps(sent)) >= last
