#!/usr/bin/env bash
# Run a command against an instrumented build of the extension: instrumented.sh NAME COMMAND...
# NAME is asan, ubsan, tsan or anything else (then the environment says what is special, see setup.py).
# The tree is copied to build/NAME and built there, so that the ordinary build stays what it is.
set -euo pipefail
name=$1
shift
top=$(cd "$(dirname "$0")/.." && pwd)
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
copy=$top/build/$name
mkdir -p "$copy"
tar -C "$top" --exclude='*.so' --exclude=__pycache__ --exclude=_core.c -cf - \
  areal_fast csrc tests setup.py pyproject.toml README.md | tar -C "$copy" -xf -
cd "$copy"
preload=
case $name in
  asan) export AREAL_FAST_SANITIZE=address ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1
        preload=$(gcc -print-file-name=libasan.so) ;;
  ubsan) export AREAL_FAST_SANITIZE=undefined UBSAN_OPTIONS=print_stacktrace=1
         preload=$(gcc -print-file-name=libubsan.so) ;;
  tsan) export AREAL_FAST_SANITIZE=thread TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1:report_bugs=1
        preload=$(gcc -print-file-name=libtsan.so) ;;
esac
echo "building $name in build/$name"
CC=gcc "$python" setup.py -q build_ext --inplace
[ -z "$preload" ] || export LD_PRELOAD=$preload
exec "$python" "$@" -p no:cacheprovider
