"""The model directory's public face: open, save, and the errors of both are documented there."""

from edje_pipeline.models.model_directory import ModelDirectory, open_directory, open_model
from edje_pipeline.models.model_writer import save_model

__all__ = ["ModelDirectory", "open_directory", "open_model", "save_model"]
