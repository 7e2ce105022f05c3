"""Settings that may differ from those of the training: where and what of a model is measured, not of which model."""

MEASURED = (
    *("evaluate.suite", "evaluate.sets", "evaluate.max_images", "evaluate.noise_std"),
    *("evaluate.attack.", "evaluate.generate."),
)
REGISTERED = ("evaluate.model_name", "evaluate.champion")
"""As which model a run's is registered: kept from the training."""

FREE = (*MEASURED, *REGISTERED, "data.root", "data.download", "device", "storage_path", "tracking.")
