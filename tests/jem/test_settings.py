import pickle
import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jem.config import SCIENCE, DataConfig, JEMConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, SGLDConfig
from jem.errors import ConfigError
from jem.settings import Entry, Settings, build, describe, digest, flatten, override, setting


def problems(function):
    """Key to (message, origin) of the mistakes that `function` reports."""
    with pytest.raises(ConfigError) as caught:
        function()
    found = {p.key: (p.message, p.origin) for p in caught.value.problems}
    assert len(found) == len(caught.value.problems)
    return found


def built(**entries):
    return build(JEMConfig, {key.replace("__", "."): Entry(value) for key, value in ({"seed": 0} | entries).items()})


def test_every_mistake_is_reported_at_once_each_with_where_it_was_written():
    entries = {
        "sgld.step_size": Entry(-1, "a.yaml:3"),
        "sgld.stepps": Entry(3, "a.yaml:4"),
        "model.norm": Entry("bacth", "command line", "bacth"),
        "optimizer.learning_rate": Entry("fast", "a.yaml:9"),
        "batch_size": Entry(2.5, "a.yaml:1"),
        "model.depth": Entry(29, "a.yaml:7"),
        "data.flip": Entry("yes", "a.yaml:11"),
        "nonsense.deep": Entry(1, "a.yaml:12"),
    }
    found = problems(lambda: build(JEMConfig, entries))
    assert {key: origin for key, (_, origin) in found.items() if key in entries} == {
        key: entry.origin for key, entry in entries.items()
    }
    messages = {key: message for key, (message, _) in found.items()}
    assert messages["sgld.step_size"] == "is -1, must be greater than 0"
    assert messages["sgld.stepps"].endswith("did you mean 'sgld.steps'?")
    assert "must be one of none, batch, instance, layer, act; did you mean 'batch'?" in messages["model.norm"]
    assert messages["optimizer.learning_rate"] == "is 'fast', a number was expected"
    assert messages["batch_size"] == "is 2.5, a whole number was expected"
    assert messages["model.depth"] == "is 29, must be 6 n + 4, such as 28 or 34"
    assert messages["data.flip"] == "is 'yes', true or false was expected"
    assert messages["nonsense.deep"].startswith("no such setting")
    assert messages["seed"].startswith("is required")
    assert set(messages) == {*entries, "seed"}


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("sgld.step_sise", "sgld.step_size"), ("capacity", "replay.capacity"), ("model.learning_rate", "optimizer")],
)
def test_a_key_that_is_not_there_gets_a_suggestion_even_in_the_wrong_group(key, suggestion):
    message, _ = problems(lambda: built(**{key: 1}))[key]
    assert f"did you mean '{suggestion}" in message


@pytest.mark.parametrize(
    ("key", "wrong", "right", "bound"),
    [
        ("sgld.step_size", 0, 1e-9, "greater than 0"),
        ("sgld.noise_scale", -1e-9, 0, "at least 0"),
        ("replay.reinit_prob", 1.0001, 1, "at least 0 and at most 1"),
        ("optimizer.ema_decay", 1, 0.9999, "at least 0 and less than 1"),
        ("seed", 2**31, 2**31 - 1, "at least 0 and less than"),
        ("optimizer.learning_rate", float("nan"), 1, "greater than 0"),
        ("optimizer.learning_rate", float("inf"), 1e300, "greater than 0"),
        ("optimizer.betas", [0.9, 1.0], [0.0, 0.5], "less than 1"),
        ("model.channels", [4, 0], [4, 1], "at least 1"),
    ],
)
def test_bounds_are_named_and_hold_to_the_last_digit(key, wrong, right, bound):
    message, _ = problems(lambda: built(**{key: wrong}))[key]
    assert bound in message
    assert flatten(built(**{key: right}))[key] == (tuple(right) if isinstance(right, list) else right)


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("sgld.step_size", "1e-3", 0.001),  # text in YAML 1.1
        ("sgld.step_size", 2, 2.0),
        ("replay.capacity", "1e4", 10_000),
        ("replay.capacity", 1e4, 10_000),
        ("sgld.clamp", "none", None),
        ("sgld.clamp", None, None),
        ("sgld.clamp", 1, 1.0),
        ("optimizer.decay_steps", [10, "2e1"], (10, 20)),
        ("optimizer.decay_steps", [], ()),
    ],
)
def test_numbers_lists_and_none_are_read_as_they_are_commonly_written(key, written, value):
    got = flatten(built(**{key: written}))[key]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("key", "written"),
    [
        *(("sgld.steps", v) for v in (1.5, "1.5", True, "many", None, [3], float("inf"), "nan", "inf")),
        *(("sgld.step_size", v) for v in (True, None, "", "1,5", [1.0])),
        *(("data.flip", v) for v in (1, 0, "true", "no", None)),
        *(("data.name", v) for v in (5, True, None)),
        *(("model.channels", v) for v in (5, "16", [1.5], [True], {"a": 1})),
        *(("model.options", v) for v in (5, "a", [1])),
    ],
)
def test_nothing_is_rounded_guessed_or_taken_for_a_truth_value(key, written):
    message, _ = problems(lambda: built(**{key: written}))[key]
    assert "expected" in message or "must be" in message


def test_text_of_the_command_line_stays_text_where_text_is_meant():
    config = build(JEMConfig, {"seed": Entry(0), "data.root": Entry(2024, "command line", "2024")})
    assert config.data.root == "2024"


def test_options_of_ones_own_function_are_set_one_by_one_and_merge():
    entries = {"seed": 0, "model.name": "mine:net", "model.options": {"a": 1, "b": 2}, "model.options.b": 3}
    config = build(JEMConfig, {k: Entry(v) for k, v in entries.items()})
    assert config.model.options == {"a": 1, "b": 3}
    assert override(config, {"model.options.c": 4}).model.options == {"a": 1, "b": 3, "c": 4}
    assert config.model.options == {"a": 1, "b": 3}


def test_options_that_are_no_mapping_are_a_mistake_and_give_way_to_one_that_is():
    message, _ = problems(lambda: built(**{"model.options": 3}))["model.options"]
    assert message == "is 3, a mapping was expected"
    assert built(**{"model.name": "mine:net", "model.options": 3, "model.options.a": 1}).model.options == {"a": 1}


def test_a_settings_class_made_directly_is_validated_the_same():
    found = problems(lambda: SGLDConfig(steps=0, step_size=-1.0))
    assert set(found) == {"steps", "step_size"}
    assert SGLDConfig(step_size=1).step_size == 1.0
    assert ModelConfig(channels=[1, 2]).channels == (1, 2)
    assert set(problems(lambda: OptimizerConfig(betas=(0.9,)))) == {"betas"}
    with pytest.raises(TypeError, match="seed"):
        JEMConfig()


@pytest.mark.parametrize(
    ("entries", "key", "says"),
    [
        ({"replay.capacity": 63}, "replay.capacity", "must be at least batch_size (64)"),
        ({"objective.p_x_y_weight": 1}, "sgld.conditional", "must be true"),
        ({"objective.p_x_weight": 0, "objective.p_y_given_x_weight": 0}, "objective.p_x_weight", "nothing would be"),
        ({"optimizer.decay_steps": [5, 3]}, "optimizer.decay_steps", "must rise"),
        ({"optimizer.decay_steps": [3, 3]}, "optimizer.decay_steps", "must rise"),
        ({"data.labelled_batch_size": 5}, "data.labelled_batch_size", "no effect"),
        ({"data.name": "imagefolder"}, "data.root", "is required"),
        ({"data.name": "cifar11"}, "data.name", "did you mean 'cifar10'"),
        ({"model.name": "wide_resnt"}, "model.name", "did you mean 'wide_resnet'"),
        ({"model.name": ":f"}, "model.name", "package.module:function"),
    ],
)
def test_values_that_are_each_right_but_do_not_go_together_are_found(entries, key, says):
    message, _ = problems(lambda: built(**entries))[key]
    assert says in message


def test_a_classifier_needs_no_chains_and_so_no_room_for_them():
    config = built(**{"objective.p_x_weight": 0, "replay.capacity": 1})
    assert not config.objective.samples_needed
    assert ObjectiveConfig().samples_needed


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**31 - 1),
        "batch_size": st.integers(1, 10_000),
        "sgld.step_size": st.floats(1e-300, 1e300),
        "sgld.clamp": st.none() | st.floats(0.1, 10),
        "sgld.conditional": st.booleans(),
        "model.channels": st.lists(st.integers(1, 999), max_size=4),
        "model.options": st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=2),
        "optimizer.decay_steps": st.sets(st.integers(1, 10**6), max_size=4).map(sorted),
        "data.root": st.none() | st.text(min_size=5),
        "objective.p_y_given_x_weight": st.floats(0.1, 9),
    },
)


@given(CHANGES, CHANGES)
def test_a_configuration_is_built_again_from_what_it_flattens_to_and_overrides_come_last(first, second):
    base = JEMConfig(seed=1, model=ModelConfig(name="mine:net"))
    config = override(override(base, first), second)
    again = build(JEMConfig, {key: Entry(value) for key, value in flatten(config).items()})
    assert again == config
    assert pickle.loads(pickle.dumps(config)) == config
    flat, expected = flatten(config), flatten(base) | first | second
    for key, value in expected.items():
        assert flat[key] == (tuple(value) if isinstance(value, list) else value)
    assert set(flat) == set(expected)
    assert digest(flat) == digest(flatten(again))
    assert (digest(flat) == digest(flatten(base))) == (config == base)


def test_every_field_is_science_and_the_digest_stays_so_that_a_run_is_found_again():
    assert {key.partition(".")[0] for key in flatten(JEMConfig(seed=0))} == set(SCIENCE)
    assert digest({"b": (1, 2), "a": 0.5}) == "e6ed64e4"


def test_errors_cross_process_boundaries_whole():
    with pytest.raises(ConfigError) as caught:
        built(batch_size=0, seed=-1)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.problems == caught.value.problems
    assert str(again) == str(caught.value)
    assert again.exit_code == 2


def test_help_has_every_setting_with_its_default_bounds_and_meaning():
    lines = {key: (default, meaning) for key, default, meaning in describe(JEMConfig)}
    assert set(lines) == set(flatten(JEMConfig(seed=0)))
    assert lines["seed"][0] == "required"
    assert lines["sgld.step_size"][0] == "1"
    assert lines["sgld.step_size"][1].endswith("[greater than 0]")
    assert "none | batch | instance | layer | act" in lines["model.norm"][1]


def test_defaults_are_the_papers():
    config = JEMConfig(seed=0)
    assert (config.model.depth, config.model.width, config.model.norm, config.model.activation) == (
        *(28, 10),
        *("none", "leaky_relu"),
    )
    assert (config.sgld.steps, config.sgld.step_size, config.sgld.noise_scale, config.sgld.clamp) == (20, 1, 0.01, None)
    assert (config.replay.capacity, config.replay.reinit_prob) == (10_000, 0.05)
    adam = config.optimizer
    assert (adam.name, adam.learning_rate, adam.betas, adam.warmup_steps) == ("adam", 1e-4, (0.9, 0.999), 1000)
    assert (adam.weight_decay, adam.decay_rate, config.batch_size) == (0, 0.3, 64)
    assert (config.data.noise_std, config.data.crop_padding, config.data.flip) == (0.03, 4, True)
    weights = config.objective
    assert (weights.p_x_weight, weights.p_y_given_x_weight, weights.p_x_y_weight, weights.energy_l2) == (1, 1, 0, 0)


@dataclass(frozen=True)
class Plain(Settings):
    size: int = setting(3, ge=1, le=5, doc="a size")


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(AttributeError):
        Plain().size = 4
    assert override(Plain(), {"size": 4}) == Plain(4)
    assert DataConfig(name="digits") == DataConfig(name="digits")


def test_mistakes_are_found_before_torch_is_imported():
    code = "import sys; import jem.config, jem.settings; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
