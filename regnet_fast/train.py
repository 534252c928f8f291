"""The former place of `regnet_fast.training.train`."""

from .training.train import TrainingError, TrainOptions, train

__all__ = ["TrainOptions", "TrainingError", "train"]
