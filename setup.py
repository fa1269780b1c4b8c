"""Compiles bertjax/cpu's library, where that can be done; everything else about the package is in pyproject.toml."""

import importlib.util
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("bertjax/cpu")
# What a CPU must have is checked when the library is loaded, so what it was compiled on makes no difference.
FLAGS = """-O3 -std=c++17 -mavx2 -mfma -mbmi2 -mlzcnt -mpopcnt -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16
-mavx512vnni -mamx-tile -mamx-bf16 -mamx-int8 -mtune=sapphirerapids -Wno-attributes -Wno-return-type"""


def extensions() -> list[Extension]:
    """The library, on x86-64 Linux."""
    jaxlib = importlib.util.find_spec("jaxlib")
    if platform.system() != "Linux" or platform.machine() != "x86_64" or jaxlib is None:
        print("bertjax: no native CPU encoder for this platform; XLA alone will be used")
        return []
    library = Extension(
        "bertjax.cpu.libencoder",
        sources=[str(SOURCES / "encoder.cc")],
        depends=sorted(map(str, SOURCES.glob("*.h"))),
        include_dirs=[str(Path(jaxlib.submodule_search_locations[0]) / "include")],
        extra_compile_args=FLAGS.split(),
        language="c++",
        optional=True,
    )
    return [library]


class BuildLibrary(build_ext):
    """Builds a plain shared library: it is loaded by ctypes and knows nothing of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """The file's name, without Python's version in it."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compiles it, or says in a line that it could not be compiled."""
        try:
            super().build_extension(ext)
        except Exception as error:
            print(f"bertjax: the native CPU encoder could not be compiled; XLA alone will be used: {error}")


class AnyPython(bdist_wheel):
    """A wheel for every version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tag: a platform's only if there is something compiled in it."""
        tag = super().get_tag()
        compiled = any(Path(self.bdist_dir).rglob("*.so")) if Path(self.bdist_dir).exists() else False
        return "py3", "none", tag[2] if compiled else "any"


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython})
