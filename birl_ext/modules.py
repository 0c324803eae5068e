"""Code of a user's own, imported by the path of its file or by its name."""

from __future__ import annotations

import importlib
import sys
import traceback
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from birl_ext.errors import ConfigError

__all__ = ["import_own", "locate"]


def locate(source: str) -> str:
    """What finds a module again from anywhere, such as from a run that is resumed.

    Args:
        source: the path of a file, or the name of a module, which is looked for in the present
            directory first.

    Returns:
        The absolute path of its file; of a package, or of a module in one, the name.

    Raises:
        ConfigError: there is none.
    """
    path = Path(source).expanduser()
    named = path.suffix != ".py" and path.name == source
    if named and not (path := Path(f"{source}.py")).is_file():
        spec = _spec(source)
        if spec is None or spec.origin is None:  # of a directory that is no package
            raise _missing(source, "")
        if "." in source or spec.submodule_search_locations is not None or not spec.has_location:
            return source
        path = Path(str(spec.origin))
    path = path.resolve()
    if not path.is_file():
        raise _missing(source, str(path))
    return str(path)


def import_own(source: str) -> ModuleType:
    """The module that `locate` finds, imported as by `import`: once in a process.

    Raises:
        ConfigError: there is none, its name is another's, or it raises.
    """
    name = found = locate(source)
    path = Path(found)
    if path.is_absolute():
        name = path.stem
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))  # last, where it hides nothing
        spec = _spec(name) if name.isidentifier() else None
        other = str(spec.origin) if spec is not None else ""
        if not other or Path(other).resolve() != path:
            raise ConfigError(
                f"{name!r} cannot be imported by this name",
                where=found,
                allowed=f"another than that of {other}" if other else "a Python name",
                fix="rename the file",
            )
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == found]
        raise ConfigError(
            f"importing module {name!r} raised {type(error).__name__}: {error}",
            where=found + (f", line {lines[-1]}" if lines else ""),
            fix="mend it; python alone shows the whole traceback",
        ) from error


def _spec(name: str) -> ModuleSpec | None:
    """Where a module is; to look inside a package imports it."""
    importlib.invalidate_caches()  # a file may be younger than what is known of its directory
    try:
        return None if name.startswith(".") else find_spec(name)
    except (ModuleNotFoundError, ValueError):
        return None
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"looking for module {name!r} raised {type(error).__name__}: {error}",
            fix="mend the package that it is in",
        ) from error


def _missing(source: str, where: str) -> ConfigError:
    return ConfigError(
        f"there is no module {source!r}",
        where=where,
        allowed="the path of a .py file, or the name of a module that is installed",
        fix="give the path of its file: --module FILE, load(…, module=FILE)",
    )
