"""Finds the App that a command line names: ``module``, ``module:app``, ``path/file.py`` or ``path/file.py:app``.

A file is imported under its stem with its folder first on ``sys.path``, so that spawned children import the same module.
Refuses to own what is done with the App. Every failure is one line; the cause stays attached for ``--debug``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from orchestra.app import App
from orchestra.errors import ConfigurationError

__all__ = ["is_target", "load_app"]


def load_app(target: str) -> App:
    """The App that ``target`` names; with a module alone, the only one in it.

    Raises:
        ConfigurationError: there is no such file, module or App, there are several, or the import failed; the text
            names the exception and where it was raised.
    """
    place, name = _split(target)
    if not place:
        raise _wrong(target, "is empty: give a module (pkg.mod:app) or a file (path/to/file.py)")
    module = _import_file(target, Path(place)) if _is_file(place) else _import_module(target, place)
    return _named(target, module, name) if name else _only(target, module)


def is_target(text: str) -> bool:
    """Whether ``text`` is a target rather than the name of a queue: it has a colon or a slash, or ends in ``.py``.

    A module alone looks like a queue's name; write ``module:app``.
    """
    return bool(_split(text)[1]) or _is_file(text)


def _split(target: str) -> tuple[str, str]:
    place, colon, name = target.strip().rpartition(":")
    if not colon or "/" in name or "\\" in name:  # C:\jobs.py
        return target.strip(), ""
    return place, name


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place or os.sep in place


def _wrong(target: str, what: str) -> ConfigurationError:
    return ConfigurationError(f"{target!r} {what}", field="target", value=target)


def _import_file(target: str, path: Path) -> ModuleType:
    if not path.is_file():
        what = "is a directory: name a file in it" if path.is_dir() else f"is no file in {Path.cwd()}"
        raise _wrong(target, what)
    path = path.resolve()
    if not path.stem.isidentifier():
        raise _wrong(target, f"cannot be imported: {path.stem!r} is not a Python name; rename the file")
    _put_first(str(path.parent))
    loaded = sys.modules.get(path.stem)
    if loaded is not None and _is_from(loaded, path):
        return loaded
    if loaded is not None or not _would_find(path):
        raise _wrong(target, f"cannot be imported: a module {path.stem!r} exists already; rename the file")
    return _import(target, path.stem)


def _would_find(path: Path) -> bool:
    """Whether importing the stem finds this very file, here and in a spawned child."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(path.stem)
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == path


def _is_from(module: ModuleType, path: Path) -> bool:
    origin = getattr(module, "__file__", None)
    return origin is not None and Path(origin).resolve() == path


def _import_module(target: str, name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise _wrong(target, "is neither a module (pkg.mod:app) nor a file (path/to/file.py)")
    _put_first(str(Path.cwd()))  # as `python -m` does
    return _import(target, name)


def _put_first(folder: str) -> None:
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)


def _import(target: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            hint = f"there is no module {error.name!r} in {Path.cwd()} or on the Python path"
            if Path(f"{name}.py").is_file() or Path(name.replace(".", "/") + ".py").is_file():
                hint += f"; did you mean {name.replace('.', '/')}.py?"
            raise _wrong(target, f"cannot be imported: {hint}") from error
        raise _wrong(target, _failure(error, name)) from error
    except Exception as error:
        raise _wrong(target, _failure(error, name)) from error
    except SystemExit as error:
        raise _wrong(target, f"cannot be imported: it called sys.exit({error.code!r}) while being imported") from error


def _failure(error: BaseException, name: str) -> str:
    lines = str(error).splitlines() or [""]
    text = (
        f"cannot be imported: {type(error).__name__}: {lines[0]}"
        if lines[0]
        else f"cannot be imported: {type(error).__name__}"
    )
    if isinstance(error, SyntaxError):  # its text already says where
        return text
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else f" (while importing {name})"
    return text + where


def _is_users(filename: str) -> bool:
    return not filename.startswith("<") and Path(__file__).parents[1] not in Path(filename).parents


def _named(target: str, module: ModuleType, name: str) -> App:
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, App):
        return found
    if found is None:
        raise _wrong(target, f"has no {name!r}{_listed(module)}")
    raise _wrong(target, f"names a {type(found).__name__}, not an App{_listed(module)}")


def _only(target: str, module: ModuleType) -> App:
    apps = _apps(module)
    distinct = {id(app): app for app in apps.values()}
    if len(distinct) == 1:
        return next(iter(distinct.values()))
    if not distinct:
        raise _wrong(target, 'has no App: write `app = App("name")` at its top level')
    raise _wrong(
        target,
        f"has {len(distinct)} Apps: name one of them, such as {target.strip()}:{next(iter(apps))}{_listed(module)}",
    )


def _apps(module: ModuleType) -> dict[str, App]:
    return {name: value for name, value in vars(module).items() if isinstance(value, App)}


def _listed(module: ModuleType) -> str:
    apps = _apps(module)
    return f"; its Apps are: {', '.join(apps)}" if apps else "; it has no App"
