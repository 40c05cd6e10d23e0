"""The configuration: YAML file + key=value overrides -> one validated, typed tree."""

from prime_fast.config.load import (
    known_keys,
    load_config,
    make_config,
    parse_assignments,
    save_config,
)
from prime_fast.config.sections import (
    DataConfig,
    EngineConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OfflineConfig,
    OptimizerConfig,
    PolicyConfig,
    PrimeConfig,
    PrmConfig,
    RewardConfig,
    RolloutConfig,
    Section,
    SftConfig,
    WatchConfig,
)
from prime_fast.config.tree import Config

__all__ = [
    "Config",
    "DataConfig",
    "EngineConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "OfflineConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "PrimeConfig",
    "PrmConfig",
    "RewardConfig",
    "RolloutConfig",
    "Section",
    "SftConfig",
    "WatchConfig",
    "known_keys",
    "load_config",
    "make_config",
    "parse_assignments",
    "save_config",
]
