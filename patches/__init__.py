"""Everything that touches other people's code, one file per framework. Imported as `megatron_lowbit.patches`.

A patch is imported when it is first asked for (`megatron_lowbit.patches.megatron_core`), so that none of the frameworks
needs to be installed for the others to work. A framework that is missing is a LowBitError that says what to install.
"""

from importlib import import_module
from pkgutil import iter_modules


def _names() -> list[str]:
    return sorted(
        module.name for module in iter_modules(__path__) if not module.ispkg and not module.name.startswith("_")
    )


def __getattr__(name: str):
    if name.startswith("_") or name not in (names := _names()):
        known = "" if name.startswith("_") else f"; there are: {', '.join(names) or 'none'}"
        raise AttributeError(f"module {__name__!r} has no patch {name!r}{known}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_names()})
