"""What differs between the settings of two runs, by their manifests as they were written."""

from pathlib import Path

from common.errors import RunError
from server.watching.folder import RunFolder

__all__ = ["differences"]


def differences(a: Path, b: Path) -> dict[str, tuple[str | None, str | None]]:
    """The settings that are not equal, by their dotted keys; None where a run has none.

    Raises:
        RunError: a manifest cannot be read.
    """
    first, second = _settings(a), _settings(b)
    keys = [*first, *(key for key in second if key not in first)]
    return {key: (first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)}


def _settings(path: Path) -> dict[str, str]:
    settings = RunFolder(path).settings()
    if not settings:
        raise RunError(f"{path / 'federation.toml'} cannot be read, so the settings of this run are not known")
    return settings
