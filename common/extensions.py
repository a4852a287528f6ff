"""A person's own code, named in the manifest as 'module:function': found, imported, checked to be callable."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import ExtensionError

__all__ = ["load"]


def load(path: str, what: str, *, search: Path | None = None) -> Callable[..., Any]:
    """What `path` ('module:function') names; `what` says in errors what it is for, such as "partitioner".

    `search` is a folder to import from, as a rule the manifest's. It goes to the END of `sys.path`, so that nothing
    in it can take the place of Coadapt's rooms or of an installed package, and stays there, so that a function that
    imports its neighbours late finds them. Importing runs the module: name only code that you trust.
    An ExtensionError, on one line, says what is missing.
    """
    module_name, colon, name = path.partition(":")
    if not (colon and module_name and name):
        raise ExtensionError(f"{what} {path!r}: must be 'module:function'")
    if search is not None and str(search.resolve()) not in sys.path:
        sys.path.append(str(search.resolve()))
    importlib.invalidate_caches()  # the module may have been written a moment ago
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        if missing:
            beside = f" in {search} or" if search is not None else ""
            raise ExtensionError(f"{what} {path!r}: no module {module_name!r}{beside} among the installed") from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ExtensionError(f"{what} {path!r}: importing {module_name!r} failed with {reason}") from error
    if not hasattr(module, name):
        # A file named like a library, random.py for instance, is not the one that is found: say which one was.
        origin = getattr(module, "__file__", None) or "built into Python"
        raise ExtensionError(f"{what} {path!r}: module {module_name!r} ({origin}) has no {name!r}")
    function = getattr(module, name)
    if not callable(function):
        raise ExtensionError(f"{what} {path!r}: must be a function, found {type(function).__name__}")
    loaded: Callable[..., Any] = function
    return loaded
