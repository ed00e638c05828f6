"""Every error the trainer raises on purpose.

TrainerError
├── ConfigError        a setting is unknown, missing or out of range
├── DataError          a data file cannot be trained on; names file and line
└── DivergedError      the loss is no number any more; says what to change
"""


class TrainerError(Exception):
    """Base of the trainer's own errors; the message names what was wrong and the next step."""


class ConfigError(TrainerError):
    """A setting is unknown, missing, of the wrong type or out of range."""


class DataError(TrainerError):
    """A data file cannot be trained on."""


class DivergedError(TrainerError):
    """The loss became NaN or infinite."""
