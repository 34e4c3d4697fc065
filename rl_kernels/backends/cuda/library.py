"""The library ``rl_kernels/_cuda.so`` through its C interface (``csrc/cuda/abi.h``)."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

ABI = 1
"""The interface that this reads; a library of another is not loaded."""

_SHARED_MEMORY = ("stage_bytes", "source_bytes", "step_bytes", "epilogue_bytes", "kept_bytes")
_FACTS = ("threads", "rows", "columns", "depth_bytes", *_SHARED_MEMORY)
_ONE_MULTIPROCESSOR = ("shared_bytes_a_multiprocessor", "registers_a_multiprocessor")
_LIMITS = ("multiprocessors", "shared_bytes_a_block", *_ONE_MULTIPROCESSOR, "l2_bytes")


class _KernelFacts(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), *((name, ctypes.c_int32) for name in ["params_bytes", *_FACTS])]


class _DeviceFacts(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 256),
        *((name, ctypes.c_int32) for name in ["major", "minor", *_LIMITS]),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_int32),
        ("grid", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("params_bytes", ctypes.c_uint32),
        ("params", ctypes.c_char_p),
        ("stream", ctypes.c_void_p),
    ]


class Library:
    """The kernels by name, and what is known of them; a failure raises RuntimeError with the library's words."""

    def __init__(self, path: Path):
        """Load it.

        Raises:
            ImportError: it cannot be loaded, or has another interface.
        """
        self.__file__ = str(path)
        try:
            self._c = ctypes.CDLL(str(path))
            abi = self._c.rl_cuda_abi()
        except (OSError, AttributeError) as error:
            raise ImportError(str(error)) from error
        if abi != ABI:
            raise ImportError(f"its interface is number {abi}, expected {ABI}")
        for name in ("architectures", "nvcc", "runtime", "error"):
            getattr(self._c, f"rl_cuda_{name}").restype = ctypes.c_char_p

    def build_info(self) -> dict[str, str]:
        """``architectures`` as ``"8.0 9.0+PTX"``, the versions ``nvcc`` and ``runtime``."""
        return {name: getattr(self._c, f"rl_cuda_{name}")().decode() for name in ("architectures", "nvcc", "runtime")}

    def kernels(self) -> dict[str, dict[str, int]]:
        """By name: the bytes of a kernel's parameters, and its launch facts under their own names."""
        first = ctypes.POINTER(_KernelFacts)()
        count = self._c.rl_cuda_kernels(ctypes.byref(first))
        names = ["params_bytes", *_FACTS]
        return {each.name.decode(): {name: getattr(each, name) for name in names} for each in first[:count]}

    def device_info(self, index: int = 0) -> dict[str, Any]:
        """What a launch can be planned by; sizes in bytes."""
        facts = _DeviceFacts()
        self._check(self._c.rl_cuda_device(index, ctypes.byref(facts)))
        limits = {name: getattr(facts, name) for name in _LIMITS}
        return {"name": facts.name.decode(), "capability": (facts.major, facts.minor), **limits}

    def launch(self, name: str, grid: tuple[int, int, int], shared_bytes: int, stream: int, params: bytes) -> None:
        """Queue a kernel on a stream of the current device, given as an integer."""
        number = self._c.rl_cuda_find(name.encode())
        if number < 0:
            raise RuntimeError(f"there is no kernel {name} in {Path(self.__file__).name}")
        launch = _Launch(number, (ctypes.c_uint32 * 3)(*grid), shared_bytes, len(params), params, stream)
        self._check(self._c.rl_cuda_launch(ctypes.byref(launch)))

    def _check(self, failed: int) -> None:
        if failed:
            raise RuntimeError(self._c.rl_cuda_error().decode())
