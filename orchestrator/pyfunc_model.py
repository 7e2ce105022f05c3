"""The model as MLflow runs it ("models from code"): this file is copied into every registered model.

It must need nothing of this project but `jem`, which the model carries with it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException

from jem.errors import JEMError
from jem.predict import Predictor


class JointEnergyModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Images to a DataFrame with label, probability, probabilities, log_density and in_distribution."""

    def load_context(self, context: Any) -> None:
        device = os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE") or "cpu"
        self.predictor = Predictor.load(Path(context.artifacts["model"]), device)

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> pd.DataFrame:
        del context, params
        if self.predictor.card.dtype == "uint8" and len(model_input) and model_input.max() <= 1:
            # MLflow's server cuts the floats of a request off to whole numbers, without a word
            raise _refused(f"{self.predictor.card.expects} were expected, in these no value exceeds 1: give bytes")
        try:
            answer = self.predictor(model_input)
        except JEMError as error:
            raise _refused(str(error)) from error
        return pd.DataFrame(
            {
                "label": answer.label,
                "probability": answer.probability,
                "probabilities": answer.probabilities.tolist(),
                "log_density": answer.log_density,
                "in_distribution": answer.in_distribution,
            }
        )


def _refused(message: str) -> MlflowException:
    """A message that the server hands on; of any other error it tells nothing."""
    return MlflowException.invalid_parameter_value(message)


mlflow.models.set_model(JointEnergyModel())
