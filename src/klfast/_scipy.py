"""SciPy, which only some functions need."""

from importlib import import_module
from typing import Any

__all__ = ["scipy"]


def scipy(module: str) -> Any:
    """Import a module of SciPy, or raise ImportError naming the extra that installs it."""
    try:
        return import_module(f"scipy.{module}")
    except ImportError as error:
        raise ImportError('this needs SciPy: pip install "klfast[stats]"') from error
