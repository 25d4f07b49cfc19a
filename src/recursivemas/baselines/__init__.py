"""Baselines: single agents and text systems, trained on the data, prompts and meter of the links (`methods.py`)."""

from recursivemas.baselines.methods import Trained, check_method, train_baseline

__all__ = ["Trained", "check_method", "train_baseline"]
