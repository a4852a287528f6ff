"""Every error that Coadapt raises on purpose.

    CoadaptError
    ├── ManifestError        the manifest or a site policy breaks a rule (all breaches at once)
    ├── DataError            a data file is missing, unreadable or breaks a rule
    ├── ModelError           a base model is missing, has the wrong digest or does not fit the task
    ├── AdapterError         an adapter does not fit the model or the manifest
    ├── TrainingError        training cannot go on
    │   └── NotFiniteLoss    the loss became NaN or infinite
    ├── PrivacyError         a privacy setting breaks a rule, or a check of the private training failed
    │   └── BudgetError      a round would cost more than the population's cap leaves
    ├── LedgerError          the ledger cannot be opened, written or trusted
    ├── MessageError         an envelope is malformed, of another version or out of turn
    ├── RoundError           too few sites answered to finish a round
    ├── RunError             a run cannot start or a run's files cannot be used
    └── ExtensionError       something named by import path cannot be loaded or misbehaves

A message says what is wrong, the rule, the value found and what to do, on one line.
`code` is the stable name under which an error may leave a site: the text of a message may
hold a record, so between processes only the code travels (`client/relay.py`).
"""

import re

__all__ = [
    "AdapterError",
    "BudgetError",
    "CoadaptError",
    "DataError",
    "ExtensionError",
    "LedgerError",
    "ManifestError",
    "MessageError",
    "ModelError",
    "NotFiniteLoss",
    "PrivacyError",
    "RoundError",
    "RunError",
    "TrainingError",
    "error_code",
]


class CoadaptError(Exception):
    """Root of the tree; `str(error)` is the line that a person reads."""

    code = "error"


class ManifestError(CoadaptError):
    """The manifest or a site policy breaks one or more rules; `problems` lists every one."""

    code = "manifest"

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class DataError(CoadaptError):
    """A data file is missing, unreadable or breaks a rule."""

    code = "data"


class ModelError(CoadaptError):
    """A base model is missing, has the wrong digest or does not fit the task."""

    code = "model"


class AdapterError(CoadaptError):
    """An adapter does not fit the model or the manifest."""

    code = "adapter"


class TrainingError(CoadaptError):
    """Training cannot go on."""

    code = "training"


class NotFiniteLoss(TrainingError):
    """The loss became NaN or infinite; the site sits the round out."""

    code = "not_finite_loss"


class PrivacyError(CoadaptError):
    """A privacy setting breaks a rule, or a check of the private training failed."""

    code = "privacy"


class BudgetError(PrivacyError):
    """A round would cost more privacy than the population's cap leaves; nothing was charged."""

    code = "budget"


class LedgerError(CoadaptError):
    """The ledger of privacy spent cannot be opened, written or trusted; nothing is trained without it."""

    code = "ledger"


class MessageError(CoadaptError):
    """An envelope is malformed, of another version or out of turn."""

    code = "message"


class RoundError(CoadaptError):
    """Too few sites answered to finish a round."""

    code = "round"


class RunError(CoadaptError):
    """A run cannot start, or a run's files cannot be used."""

    code = "run"


class ExtensionError(CoadaptError):
    """Something named by import path cannot be loaded or does not do what it must."""

    code = "extension"


def error_code(error: BaseException) -> str:
    """The only description of `error` that may leave a site: a fixed word or a class name."""
    if isinstance(error, CoadaptError):
        return error.code
    return f"unexpected:{re.sub('[^A-Za-z0-9_]', '_', type(error).__name__)[:60]}"
