"""bitsandbytes is imported only by jobs that quantise their base or their optimizer.

If it is installed, diffusers and PEFT import it together with themselves, and PEFT does again for
each LoRA, whether or not any layer is quantised. The import takes time, prints a warning on a
machine without a GPU, and asks the hub for kernels if the package `kernels` is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

LIBRARY = "bitsandbytes"
_HELPERS = "peft.helpers"
"""Imports the library for tools that this product does not use, and does without it."""
_FLAGS = "diffusers.utils.import_utils"
"""Notes once whether the library is there. The product quantises by transformers, not diffusers."""


def is_loaded() -> bool:
    """Whether this process has imported bitsandbytes. A quantised layer exists only if it has."""
    return LIBRARY in sys.modules


def keep_out() -> None:
    """Have diffusers and PEFT leave bitsandbytes out when they are imported.

    A second call has no further effect.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def look_for_quantised_layers_only_if_loaded() -> None:
    """Have PEFT create a LoRA without importing bitsandbytes, unless a base is quantised by it."""
    from peft.tuners.lora import model  # pylint: disable=import-outside-toplevel

    for question in ("is_bnb_available", "is_bnb_4bit_available"):
        if not hasattr(model, question):
            raise ImportError(f"This version of peft has no {question}; install the pinned one.")
        setattr(model, question, is_loaded)


class _Finder(MetaPathFinder):
    """Hides bitsandbytes from two modules; it leaves everything else to the other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The specification of a module that is treated here, else None."""
        if fullname == LIBRARY and _is_being_imported(_HELPERS):
            installed = PathFinder.find_spec(fullname, path, target)
            return ModuleSpec(fullname, _Refusing()) if installed else None
        if fullname == _FLAGS and not is_loaded():
            found = PathFinder.find_spec(fullname, path, target)
            if found and found.loader:
                found.loader = _WithoutIt(found.loader)
            return found
        return None


class _Refusing(Loader):
    """Loads nothing. (A finder that raises would also end questions whether it is installed.)"""

    def create_module(self, spec: ModuleSpec) -> None:
        """Refuse."""
        raise ImportError(f"{spec.name} is not needed yet", name=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Is never reached."""


class _WithoutIt(Loader):
    """Loads a module to which bitsandbytes seems not to be installed."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module; None among the modules means that there is none of that name."""
        sys.modules[LIBRARY] = None  # type: ignore[assignment]
        try:
            self._own.exec_module(module)
        finally:
            del sys.modules[LIBRARY]


def _is_being_imported(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))
