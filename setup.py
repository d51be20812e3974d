"""Builds the extensions: the Cython edge with the whole C core in a single shared object; the device pool's
edge over csrc/cuda.c, which only the keeper and its clients import; and those that touch no arena: rows of
tokens, messages of a chat, byte pairs, replies, the short ways of requests through HTTP, and folds
of sessions. Each exports nothing but its module init. areal_fast.pth goes beside the package, not into it, in
wheels and editable installs alike: with it AREAL_FAST=1 works without an import
(areal_fast/integrations/autostart.py).
Everything else about the package is in pyproject.toml.

Environment, read at build time only:
  AREAL_FAST_SANITIZE=address|undefined|thread   an instrumented build (run under the matching LD_PRELOAD)
  AREAL_FAST_CRASH_POINTS=1                      compile the crash points in; never in a release
  AREAL_FAST_WERROR=1                            warnings of csrc/ are errors (CI)
"""

import os
from glob import glob

from Cython.Build import cythonize
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

# Loaded after setuptools, which brings its own distutils.
from distutils.command.install_data import install_data  # isort: skip

COMMON = ["-std=gnu11", "-D_GNU_SOURCE", "-fvisibility=hidden", "-fno-strict-aliasing", "-g", "-pthread"]
CORE_WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion"]
EDGE_WARNINGS = ["-Wall", "-Wno-unused-function"]

sanitize = os.environ.get("AREAL_FAST_SANITIZE", "")
crash_points = os.environ.get("AREAL_FAST_CRASH_POINTS") == "1"

compile_args = list(COMMON)
link_args = ["-pthread"]
if sanitize:
    if sanitize not in ("address", "undefined", "thread"):
        raise SystemExit(f"AREAL_FAST_SANITIZE={sanitize}: address, undefined or thread")
    flags = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"]
    if sanitize == "undefined":
        flags.append("-fno-sanitize-recover=undefined")
    compile_args += [*flags, "-O1"]
    link_args += flags
else:
    compile_args.append("-O2")


class BuildExt(build_ext):
    """Strict warnings for the C that people wrote, not for the C that Cython wrote."""

    def build_extensions(self):
        compile_one = self.compiler._compile

        def compile_with_warnings(obj, src, ext, cc_args, extra, pp_opts):
            ours = src.startswith("csrc")
            warnings = list(CORE_WARNINGS if ours else EDGE_WARNINGS)
            if ours and os.environ.get("AREAL_FAST_WERROR") == "1":
                warnings.append("-Werror")
            compile_one(obj, src, ext, cc_args, [*extra, *warnings], pp_opts)

        self.compiler._compile = compile_with_warnings
        super().build_extensions()


class DataInEditables(Distribution):
    """setuptools asks `has_data` whether an editable install has data files, and has no answer itself."""

    def has_data(self):
        return self.has_data_files()


class InstallPth(install_data):
    """The only data file is a .pth, which counts nowhere but in site-packages itself."""

    def finalize_options(self):
        self.set_undefined_options("install", ("install_purelib", "install_dir"))
        super().finalize_options()


APART = {
    "core._cuda": "csrc/cuda.c",
    "core._tokens": "csrc/tokens.c",
    "core._messages": "csrc/messages.c",
    "core._bpe": "csrc/bpe.c",
    "core._replies": None,
    "http._native": "csrc/http_head.c",
    "protocol._fold": None,
    "store._folds": None,
    "http._client": "csrc/http_head.c",
}
"""Extensions beside the core, each with the one C file it has to itself, if any."""
LIBRARIES = {"core._cuda": ["dl"]}  # where dlopen lives before glibc 2.34


def extension(name, sources, **more):
    package, module = name.split(".")
    return Extension(
        f"areal_fast.{name}",
        sources=[f"areal_fast/{package}/{module}.pyx", *sources],
        depends=[
            *glob(f"areal_fast/{package}/*.px[di]"),
            *glob("areal_fast/protocol/*.pxd"),
            *sorted(glob("csrc/*.h")),
        ],
        include_dirs=["csrc"],
        undef_macros=["NDEBUG"] if sanitize or crash_points else [],
        define_macros=[("AF_CRASH_POINTS", "1")] if crash_points else [],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        **more,
    )


core = extension(
    "core._core", [source for source in sorted(glob("csrc/*.c")) if source not in APART.values()]
)
others = [
    extension(name, [source] if source else [], libraries=LIBRARIES.get(name, []))
    for name, source in APART.items()
]

setup(
    ext_modules=cythonize([core, *others], compiler_directives={"language_level": "3"}),
    distclass=DataInEditables,
    data_files=[("", ["areal_fast/integrations/areal_fast.pth"])],
    cmdclass={"build_ext": BuildExt, "install_data": InstallPth},
)
