"""The configuration of a training run: its sections, and the files it is read from.

Never imports torch, so that a configuration can be checked anywhere.
"""

from kdcache.config.files import (
    change_config,
    dump_config,
    load_config,
    merge,
    override,
    parse_yaml,
    read_yaml,
    validate,
)
from kdcache.config.schedules import (
    ConstantRate,
    Cosine,
    LinearWarmupExponentialDecay,
    MultiStep,
    Plateau,
    RateSchedule,
    WeightSchedule,
)
from kdcache.config.settings import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    OverlayConfig,
    ProjectionConfig,
    ReferencesConfig,
    StudentConfig,
    TermConfig,
    TrainingConfig,
)

__all__ = [
    "ConstantRate",
    "Cosine",
    "DataConfig",
    "LinearWarmupExponentialDecay",
    "LossConfig",
    "ModelConfig",
    "MultiStep",
    "OptimizerConfig",
    "OverlayConfig",
    "Plateau",
    "ProjectionConfig",
    "RateSchedule",
    "ReferencesConfig",
    "StudentConfig",
    "TermConfig",
    "TrainingConfig",
    "WeightSchedule",
    "change_config",
    "dump_config",
    "load_config",
    "merge",
    "override",
    "parse_yaml",
    "read_yaml",
    "validate",
]
