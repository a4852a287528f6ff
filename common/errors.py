"""Every error that Coadapt raises on purpose.

    CoadaptError
    ├── ManifestError        the manifest or a site policy breaks a rule (all breaches at once)
    ├── DataError            a data file is missing, unreadable or breaks a rule
    ├── ModelError           a base model is missing, has the wrong digest or does not fit the task
    ├── AdapterError         an adapter does not fit the model or the manifest
    ├── DistillationError    a compact model cannot be made, stored, exported or read
    │   └── SizeNotMet       what cannot be made smaller is larger than the wanted size
    ├── AssessmentError      a model cannot be measured, or two cannot be compared
    ├── TrainingError        training cannot go on
    │   ├── NotFiniteLoss    the loss became NaN or infinite
    │   └── OutOfMemory      memory does not suffice, for half of the records at once neither
    ├── PrivacyError         a privacy setting breaks a rule, or a check of the private training failed
    │   └── BudgetError      a round would cost more than the population's cap leaves
    ├── LedgerError          the ledger cannot be opened, written or trusted
    │   └── SnapshotRefused  the ledger is older than what others have seen of it: a restored copy
    ├── PolicyBreach         what is asked exceeds the site's policy
    ├── EnrolmentError       a paper of enrolment is missing, not its owner's, or does not fit
    ├── AppRefused           an app bundle that the site did not admit, or a Flower that the launcher does not know
    ├── ServiceError         a process of Coadapt cannot be started, reached or stopped
    ├── MessageError         an envelope is malformed, of another version or out of turn
    │   ├── UnknownOrder     a poll asks about a payload that this vault has not, since it was started again
    │   └── UnknownAttempt   a message of an attempt that this vault takes no part in, or no longer
    ├── RoundError           too few sites answered to finish a round
    │   └── SumLost          a secure sum failed after vectors left, and must not be asked for again
    ├── RunError             a run cannot start or a run's files cannot be used
    ├── ReleaseError         a run's result is not published, or not for this site
    │   └── ContentRefused   a file is not what the coordinator signed
    ├── BundleError          an offline bundle cannot be made, or is not whole
    ├── SecureSumError       a secure sum was refused or cannot be formed; whoever raises it reveals nothing
    │   ├── RosterRefused    the roster is not what every institution in it signed
    │   ├── SignatureRefused a signature does not verify
    │   ├── MalformedMessage a message is cut, too long or not canonical
    │   ├── WrongContext     a message speaks of another federation, round, adapter or configuration
    │   ├── ReplayRefused    a round's attempt is not newer than what the site has answered before
    │   ├── RerunRefused     a second vector for a round in which one left already
    │   ├── OutOfTurn        a message comes too late, too early or twice
    │   ├── PolicyRefused    a round is looser than the site's own policy
    │   ├── KeyRefused       a one-time key was swapped, repeated or is of low order
    │   ├── ShareRefused     a share does not authenticate or disagrees with the others
    │   ├── SurvivorsRefused the list of survivors is not one list, or not a true one
    │   ├── TooFewSites      fewer sites than the thresholds ask for
    │   ├── VectorRefused    a vector has the wrong length, digest or form
    │   ├── NotFiniteValue   a value to be summed is NaN or infinite
    │   └── ChecksumMismatch the opened sum is not a sum of what the sites encoded
    └── ExtensionError       something named by import path cannot be loaded or misbehaves

A message says what is wrong, the rule, the value found and what to do, on one line.
`code` is the stable name under which an error may leave a site: the text of a message may
hold a record, so between processes only the code travels (`client/relay.py`).
"""

import re

__all__ = [
    "AdapterError",
    "AppRefused",
    "AssessmentError",
    "BudgetError",
    "BundleError",
    "ChecksumMismatch",
    "CoadaptError",
    "ContentRefused",
    "DataError",
    "DistillationError",
    "EnrolmentError",
    "ExtensionError",
    "KeyRefused",
    "LedgerError",
    "MalformedMessage",
    "ManifestError",
    "MessageError",
    "ModelError",
    "NotFiniteLoss",
    "NotFiniteValue",
    "OutOfMemory",
    "OutOfTurn",
    "PolicyBreach",
    "PolicyRefused",
    "PrivacyError",
    "ReleaseError",
    "ReplayRefused",
    "RerunRefused",
    "RosterRefused",
    "RoundError",
    "RunError",
    "SecureSumError",
    "ServiceError",
    "ShareRefused",
    "SignatureRefused",
    "SizeNotMet",
    "SnapshotRefused",
    "SumLost",
    "SurvivorsRefused",
    "TooFewSites",
    "TrainingError",
    "UnknownAttempt",
    "UnknownOrder",
    "VectorRefused",
    "WrongContext",
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


class DistillationError(CoadaptError):
    """A compact model cannot be made, stored, exported or read."""

    code = "distillation"


class SizeNotMet(DistillationError):
    """What cannot be made smaller is larger than the wanted size."""


class AssessmentError(CoadaptError):
    """A model cannot be measured, or two cannot be compared."""

    code = "assessment"


class TrainingError(CoadaptError):
    """Training cannot go on."""

    code = "training"


class NotFiniteLoss(TrainingError):
    """The loss became NaN or infinite; the site sits the round out."""

    code = "not_finite_loss"


class OutOfMemory(TrainingError):
    """Memory does not suffice for a step, for half of the records at once neither; the site sits the round out."""

    code = "out_of_memory"


class PrivacyError(CoadaptError):
    """A privacy setting breaks a rule, or a check of the private training failed."""

    code = "privacy"


class BudgetError(PrivacyError):
    """A round would cost more privacy than the population's cap leaves; nothing was charged."""

    code = "budget"


class LedgerError(CoadaptError):
    """The ledger of privacy spent cannot be opened, written or trusted; nothing is trained without it."""

    code = "ledger"


class SnapshotRefused(LedgerError):
    """The ledger is older than what others have seen of it: a restored copy would spend its budget twice."""

    code = "snapshot"


class PolicyBreach(CoadaptError):
    """What is asked exceeds the site's policy. Its text holds settings and numbers alone, so it may leave the site."""

    code = "policy"


class EnrolmentError(CoadaptError):
    """A paper of enrolment is missing, not its owner's, or does not fit the federation."""

    code = "enrolment"


class AppRefused(CoadaptError):
    """An app bundle that the site did not admit, or a Flower whose functions the launcher was not written for."""

    code = "app"


class ServiceError(CoadaptError):
    """A process of Coadapt cannot be started, reached or stopped."""

    code = "service"


class MessageError(CoadaptError):
    """An envelope is malformed, of another version or out of turn."""

    code = "message"


class UnknownOrder(MessageError):
    """A poll asks about a payload that the vault does not have; a vault that was started again wants it once more."""

    code = "unknown_order"


class UnknownAttempt(MessageError):
    """A message of an attempt whose one-time keys the vault does not have; the next attempt has new ones."""

    code = "unknown_attempt"


class RoundError(CoadaptError):
    """Too few sites answered to finish a round."""

    code = "round"


class SumLost(RoundError):
    """A secure sum failed after vectors without noise of their own left; a second one would tell single sites' by
    subtraction, so the round is given up."""

    code = "sum_lost"


class RunError(CoadaptError):
    """A run cannot start, or a run's files cannot be used."""

    code = "run"


class ReleaseError(CoadaptError):
    """A run's result is not published, or not for this site."""

    code = "release"


class ContentRefused(ReleaseError):
    """A file is not what the coordinator signed."""

    code = "content"


class BundleError(CoadaptError):
    """An offline bundle cannot be made, or is not whole."""

    code = "bundle"


class SecureSumError(CoadaptError):
    """A secure sum was refused or cannot be formed; whoever raises it reveals nothing."""

    code = "secure_sum"


class RosterRefused(SecureSumError):
    """The roster is not what every institution in it signed."""

    code = "roster"


class SignatureRefused(SecureSumError):
    """A signature does not verify."""

    code = "signature"


class MalformedMessage(SecureSumError):
    """A message is cut, too long or not canonical."""

    code = "malformed"


class WrongContext(SecureSumError):
    """A message speaks of another federation, round, adapter or configuration."""

    code = "context"


class ReplayRefused(SecureSumError):
    """A round's attempt is not newer than what the site has answered before."""

    code = "replay"


class RerunRefused(SecureSumError):
    """A second vector was asked for in a round in which one left already; their difference would tell."""

    code = "rerun"


class OutOfTurn(SecureSumError):
    """A message comes too late, too early or twice."""

    code = "out_of_turn"


class PolicyRefused(SecureSumError):
    """A round is looser than the site's own policy or its roster."""

    code = "sum_policy"


class KeyRefused(SecureSumError):
    """A one-time key was swapped, repeated or is of low order."""

    code = "key"


class ShareRefused(SecureSumError):
    """A share does not authenticate or disagrees with the others; `sites` are whose share it is, if that shows."""

    code = "share"

    def __init__(self, message: str, sites: tuple[int, ...] = ()) -> None:
        self.sites = sites
        super().__init__(message)


class SurvivorsRefused(SecureSumError):
    """The list of survivors is not one list, or not a true one; `evidence` is a signed message that shows it."""

    code = "survivors"

    def __init__(self, message: str, evidence: bytes = b"") -> None:
        self.evidence = evidence
        super().__init__(message)


class TooFewSites(SecureSumError):
    """Fewer sites than the thresholds ask for."""

    code = "too_few"


class VectorRefused(SecureSumError):
    """A vector has the wrong length, digest or form."""

    code = "vector"


class NotFiniteValue(SecureSumError):
    """A value to be summed is NaN or infinite; the site sits the round out."""

    code = "not_finite"


class ChecksumMismatch(SecureSumError):
    """The opened sum is not a sum of what the sites encoded; it must not be used."""

    code = "checksum"


class ExtensionError(CoadaptError):
    """Something named by import path cannot be loaded or does not do what it must."""

    code = "extension"


def error_code(error: BaseException) -> str:
    """The only description of `error` that may leave a site: a fixed word or a class name."""
    if isinstance(error, CoadaptError):
        return error.code
    return f"unexpected:{re.sub('[^A-Za-z0-9_]', '_', type(error).__name__)[:60]}"
