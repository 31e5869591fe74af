"""Models: students and native teachers, built by name."""

from kdcache.models.build import build_model
from kdcache.models.interface import Hyperparameters, Model

__all__ = ["Hyperparameters", "Model", "build_model"]
