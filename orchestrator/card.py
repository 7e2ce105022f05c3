"""A model card (Mitchell et al., 2019) in Markdown, from a model's report and from what is stored with the model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.bundled import bundled_models
from orchestrator.config import DEFAULTS
from orchestrator.report_further import (
    chains_about,
    chains_table,
    gen_about,
    gen_table,
    masking_lines,
    robust_about,
    robust_sentences,
    robust_tables,
)
from orchestrator.report_pictures import picture_names
from orchestrator.report_table import (
    classification_rows,
    conventions,
    interval_text,
    ood_rows,
    parts,
    per_class_rows,
    shape_text,
    splits_text,
    temperature_text,
)

WEIGHTS = {
    "model": "those of the last step",
    "ema": "averaged over the steps (exponential moving average)",
    "best": "those that were best on the validation split",
}

COLUMNS = (
    ("label", "the most probable class"),
    ("probability", "its probability, temperature-scaled"),
    ("probabilities", "of all classes, in the order below, temperature-scaled"),
    ("log_density", "log p(x) in nats, up to a constant of this model"),
    ("in_distribution", "whether `log_density` reaches the threshold"),
)
"""What predict answers, a row an image."""


def model_card(report: dict[str, Any] | None, served: dict[str, Any] | None, links: dict[str, str]) -> str:
    """The card of a model: of its evaluation (none: the card says so) and its model.json (none: not how to use it).

    `links` is of names to addresses. One under a picture's file name says where it lies (those of the report are
    beside the card else), `model` is what mlflow.pyfunc.load_model takes, the others are listed.
    """
    facts = _facts(report, served)
    blocks = [
        *_what(facts),
        *_use(report, served, links),
        *_data(facts),
        *_training(facts),
        *(_metrics(report) if report else _not_evaluated()),
        *_pictures(report, links),
        *_limits(report, facts),
        *_hashes(facts),
        *_links(report, links),
    ]
    return "\n\n".join(blocks) + "\n"


def kind(config: dict[str, Any]) -> str:
    """`JEM`; `detector`, whose energy was trained to tell samples from data; `classifier`: no chains were run."""
    given = {key: config.get(key, DEFAULTS[key]) for key in DEFAULTS if key.startswith("objective.")}
    if given["objective.p_x_y_weight"]:
        return "JEM"
    if given["objective.p_x_weight"]:
        return "detector" if given["objective.p_x_loss"] == "bce" else "JEM"
    return "classifier"


def _facts(report: dict[str, Any] | None, served: dict[str, Any] | None) -> dict[str, Any]:
    """What both know, the report first: {model, data, facts}, each a dict, perhaps of less than a report's."""
    served = served or {}
    info = served.get("info", {})
    report = report or {}
    model = {key: info[key] for key in ("name", "source", "step", "weights", "parameters") if key in info}
    model |= {key: served[key] for key in ("config", "digest") if key in served} | report.get("model", {})
    data: dict[str, Any] = {key: served[key] for key in ("image_shape", "classes") if key in served}
    config = model.get("config", {})
    data |= {"name": config.get("data.name", "unknown data"), "digest": info.get("data_digest")}
    return {
        "model": model,
        "data": data | report.get("data", {}),
        "facts": info.get("facts", {}) | report.get("facts", {}),
        "kind": kind(config),
        "config": config,
    }


def _what(facts: dict[str, Any]) -> Iterator[str]:
    model, data = facts["model"], facts["data"]
    yield f"# {_text(model.get('name') or model.get('source') or 'Model')}"
    trained = {
        "JEM": "A **Joint Energy Model** (Grathwohl et al., [ICLR 2020](https://arxiv.org/abs/1912.03263)): one "
        "network f whose logits are a classifier, p(y|x) = softmax f(x), and a density, log p(x) = logsumexp f(x) + "
        "constant, trained as both.",
        "detector": "A **hybrid classifier** (after DAT, 2026, and Joint Energy Models, Grathwohl et al., [ICLR 2020]"
        "(https://arxiv.org/abs/1912.03263)): one network f whose logits are a classifier, p(y|x) = softmax f(x), and "
        "a detector that tells data from its own samples by logsumexp f(x), called log p(x) here. That is a log ratio "
        "of two densities, not one.",
        "classifier": "A **classifier**. Its logits are read as a Joint Energy Model's too (Grathwohl et al., "
        "[ICLR 2020](https://arxiv.org/abs/1912.03263)), log p(x) = logsumexp f(x) + constant, but no samples were "
        "drawn in its training, and so it never learnt that density.",
    }
    yield trained[facts["kind"]]
    size = f", {model['parameters']:,} parameters" if model.get("parameters") else ""
    network = f"Network: {_code(facts['config'].get('model.name', 'unknown'))}{size}."
    shape = (
        f" It takes {shape_text(data)} ({_text(data['name'])})." if {"image_shape", "classes"} <= data.keys() else ""
    )
    yield network + shape


def _use(report: dict[str, Any] | None, served: dict[str, Any] | None, links: dict[str, str]) -> Iterator[str]:
    if not served:
        return
    c, h, w = served["image_shape"]
    n = (h, w, c) if served["layout"] == "NHWC" else (c, h, w)
    shape = f"n, {', '.join(map(str, n))}"
    values = "0 to 255" if served["dtype"] == "uint8" else "0 to 1"
    yield "## How to use it"
    yield (
        "```python\nimport mlflow\n\n"
        f"model = mlflow.pyfunc.load_model({links.get('model', 'models:/NAME@champion')!r})\n"
        f"answer = model.predict(images)  # {served['dtype']}, {values}, {served['layout']}: [{shape}]\n```"
    )
    digest, name = served["digest"], served.get("info", {}).get("name")
    if name in bundled_models():
        yield f"It comes with the project, and is registered there by `python jobs/register.py {name}`."
    yield (
        "MLflow looks where `mlflow.set_tracking_uri` or `MLFLOW_TRACKING_URI` says (of runs below `./runs` it is "
        "`sqlite:///runs/mlflow.db`). The champion may be another model: this one is the version whose tag "
        f"`jem.checkpoint` is `{digest[:12]}...`."
    )
    yield "`predict` returns a DataFrame, a row an image:"
    yield _table(("column", "meaning"), [(f"`{name}`", meaning) for name, meaning in COLUMNS])
    yield (
        f"Probabilities are softmax(f(x) / T) with T = {served['temperature']:.4g}, fitted on the validation split. "
        "`log_density` is read from the logits as they are: compare it between images, never between models. "
        f"`in_distribution` is `log_density` >= {served['threshold']:.6g}: {_tpr(report)} of the validation "
        "images reach that threshold."
    )


def _tpr(report: dict[str, Any] | None) -> str:
    return f"{report['threshold']['tpr']:.0%}" if report else "95%"


def _data(facts: dict[str, Any]) -> Iterator[str]:
    data = facts["data"]
    yield "## Data"
    lines = [f"- Data set: {_text(data['name'])}"]
    if data.get("sizes"):
        lines.append(f"- Splits: {splits_text(data)}")
    if data.get("image_shape"):
        c, h, w = data["image_shape"]
        lines.append(f"- Images: {h}x{w} pixels, {c} channel{'s' * (c != 1)}")
    if data.get("classes"):
        lines.append(f"- {len(data['classes'])} classes: {', '.join(map(_text, data['classes']))}")
    yield "\n".join(lines)


def _training(facts: dict[str, Any]) -> Iterator[str]:
    model, config = facts["model"], facts["config"]
    yield "## Training"
    weights = model.get("weights")
    step = "unknown" if model.get("step") is None else f"{model['step']:,}"
    yield "\n".join(
        [
            f"- Seed: {config.get('seed', 'unknown')}",
            f"- Steps: {step}",
            f"- Weights: {_text(weights or 'unknown')}" + (f", {WEIGHTS[weights]}" if weights in WEIGHTS else ""),
        ]
    )
    changed = [
        (_code(key), _code(value), _code(DEFAULTS[key]) if key in DEFAULTS else "")
        for key, value in config.items()
        if key != "seed" and (key not in DEFAULTS or _plain(value) != _plain(DEFAULTS[key]))
    ]
    if changed:
        yield "Settings that are not the defaults, which are the paper's:"
        yield _table(("setting", "value", "default"), changed)
    elif config:
        yield "All settings are the defaults, which are the paper's."


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _not_evaluated() -> Iterator[str]:
    yield "## Metrics"
    yield "This model was **not evaluated** (`evaluate.suite=none`): nothing is known of how good it is."


def _metrics(report: dict[str, Any]) -> Iterator[str]:
    yield "## Metrics"
    images = f"{report['test']['n']:,} test images"
    yield f"On {images}, with 95 % bootstrap intervals in brackets; suite `{report['suite']}`."
    yield "### Classification and calibration"
    scaled = f"at temperature {report['temperature']['value']:.4g}"
    yield _table(("metric", "as it is", scaled), classification_rows(report))
    yield f"Temperature: {_text(temperature_text(report['temperature']))}."
    rows, note = per_class_rows(report)
    if rows:
        yield "### Classes"
        yield _table(("class", "n", "accuracy", "precision", "recall", "F1"), [(_text(r[0]), *r[1:]) for r in rows])
        yield f"{note}."
    if report.get("ood"):
        yield "### Out of distribution"
    for name, entry in report.get("ood", {}).items():
        called = interval_text(entry.get("called_outside"))
        yield (
            f"**{_text(name)}**, {entry['n']:,} images: {_text(entry['how'])}. "
            f"Below the threshold, so called outside: {called}."
        )
        yield _table(*ood_rows(entry))
    if robust := report.get("robust"):
        yield "### Robustness"
        yield f"Accuracy under attack: {_text(robust_about(robust))}."
        for title, (head, found) in robust_tables(robust):
            yield f"**{_text(title)}**"
            yield _table(head, [row for row in found if row[0] == "worst"])
        yield "\n".join(f"- {_text(line)}" for line in masking_lines(robust))
    if gen := report.get("gen"):
        about, *hows = gen_about(gen)
        yield "### Samples"
        yield f"{_text(about[0].upper() + about[1:])}."
        yield _table(*gen_table(gen))
        yield "\n".join(f"- {_text(how)}" for how in hows)
    if chains := report.get("chains"):
        yield "### Chains"
        yield f"{_text(chains_about(chains))}."
        yield _table(*chains_table(chains))
    yield "### Conventions"
    yield "\n".join(f"- {_text(name)}: {_text(text)}" for name, text in conventions(report).items())
    if report.get("left_out"):
        yield "### Left out"
        yield "\n".join(f"- {_text(name)}: {_text(why)}" for name, why in report["left_out"].items())


PICTURES = {
    "reliability.png": "Accuracy by confidence, before and after temperature scaling",
    "confusion.png": "What the images of each class were taken for",
    "ood.png": "AUROC of each score against each out-of-distribution set",
    "roc.png": "ROC curves",
    "histograms.png": "How the scores are spread",
    "against.png": "Two models side by side",
    "against_reliability.png": "Accuracy by confidence of two models",
    "robustness.png": "Accuracy against the size of an attack",
    "adversarials.png": "Test images, and the nearest adversarials found",
    "distal.png": "Images that the model is sure of, made from noise",
    "samples_fresh.png": "Samples: chains from the prior, not selected",
    "samples_buffer.png": "Samples: the replay buffer of the training, not selected",
    "neighbours_fresh.png": "Samples from the prior, and the training images nearest to each",
    "neighbours_buffer.png": "Samples of the replay buffer, and the training images nearest to each",
    "chains.png": "What chains do in more steps than a training gives them",
}


def _pictures(report: dict[str, Any] | None, links: dict[str, str]) -> Iterator[str]:
    names = _shown(report, links)
    if names:
        yield "## Pictures"
    for name in names:
        yield f"![{PICTURES.get(name, _text(name))}]({_address(links.get(name, name))})"


def _shown(report: dict[str, Any] | None, links: dict[str, str]) -> list[str]:
    """Pictures that come with a report, and others among the links."""
    drawn = picture_names(report) if report else []
    return drawn + [name for name in links if name.endswith(".png") and name not in drawn]


def _limits(report: dict[str, Any] | None, facts: dict[str, Any]) -> Iterator[str]:
    yield "## Limits"
    noise = facts["config"].get("data.noise_std")
    lines = [
        "log-density is known up to a constant only: it is **not comparable between models**",
        f"`in_distribution`: the threshold accepts {_tpr(report)} of the validation images by construction, and so "
        "calls some images of the data outside",
    ]
    if report:
        lines += list(_measured_limits(report))
    else:
        lines.append("nothing was measured: neither accuracy, calibration nor detection is known")
    if report is None or "robust" not in report:
        lines.append("it was not tested against adversarial images")
    else:
        lines += list(robust_sentences(report["robust"]))
    if noise is not None:
        evaluated = report.get("settings", {}).get("noise_std", 0.0) if report else None
        ours = "" if evaluated is None else f"; the images evaluated had {f'{evaluated:g}' if evaluated else 'none'}"
        whose = (
            "training images"
            if facts["config"].get("data.augment_p_x", True)
            else "training images of cross-entropy, not of p(x),"
        )
        lines.append(f"{whose} had Gaussian noise of standard deviation {noise:g} on the [-1, 1] scale{ours}")
    if facts["kind"] == "classifier":
        lines.append("it was trained without chains: nothing made its log-density a density of images")
    if facts["kind"] == "detector":
        lines.append("its log-density is a log ratio of the data's density and its samples', not a density of images")
    yield "\n".join(f"- {line[0].upper()}{line[1:]}." for line in lines)


def _measured_limits(report: dict[str, Any]) -> Iterator[str]:
    sets = report.get("ood", {})
    accepted, noise = parts(report["threshold"].get("test_accepted")), report.get("settings", {}).get("noise_std")
    which = "that threshold"
    if noise:  # what is served was fitted on images without
        which = f"the threshold fitted on images with noise of {noise:g}, {report['threshold']['log_px']:.6g},"
    if accepted is not None:
        yield f"{which} accepts {accepted[0]:.1%} of the test images"
    for name, entry in sets.items():
        share = parts(entry.get("called_outside"))
        if share is not None and not any(map(math.isnan, share)):
            mistaken = f"{1 - share[0]:.1%} [{1 - share[2]:.1%}, {1 - share[1]:.1%}]"
            yield f"{which} also accepts {mistaken} of {_text(name)}, which is not of the data"
    if sets:
        yield (
            f"out-of-distribution sets measured are {', '.join(map(_text, sets))} and **no others**: what the model "
            "says of other images is not known"
        )
    else:
        yield "no out-of-distribution set was measured"
    yield "intervals cover the finite test set only, not the seed: another training run may differ by more"
    yield (
        f"binned calibration errors (ECE, MCE) are biased upward on small test sets, this one of "
        f"{report['test']['n']:,} images: a perfectly calibrated model would not measure 0"
    )


def _hashes(facts: dict[str, Any]) -> Iterator[str]:
    model, data = facts["model"], facts["data"]
    rows = [("checkpoint (sha256 of its weights)", model.get("digest")), ("data", data.get("digest"))]
    rows += [("source", model.get("source")), ("checkpoint", model.get("checkpoint"))]
    rows += [("code commit" if key == "git.commit" else key, value) for key, value in facts["facts"].items()]
    known = [(_text(key), _code(value)) for key, value in rows if value]
    if known:
        yield "## Hashes and versions"
        yield _table(("what", "value"), known)


def _links(report: dict[str, Any] | None, links: dict[str, str]) -> Iterator[str]:
    elsewhere = (*_shown(report, links), "model")
    lines = [f"- [{_text(name)}]({_address(to)})" for name, to in links.items() if name not in elsewhere]
    if lines:
        yield "## Links"
        yield "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: Any) -> str:
    """A name as one line of plain text: nothing in it is Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", " ".join(str(value).split()))


def _code(value: Any) -> str:
    text = " ".join(str(_plain(value)).split())
    return _text(text) if "`" in text else f"`{text.replace('|', chr(92) + '|')}`"


def _address(target: str) -> str:
    """A link's target; spaces and brackets would end it."""
    return re.sub(r"[\s()<>]", lambda found: f"%{ord(found[0]):02X}", target)
