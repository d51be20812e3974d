#!/bin/sh
# Checks both models and shows that each broken variant is caught. Needs spin (Debian: apt-get install spin) and cc.
set -eu
cd "$(dirname "$0")"
if ! command -v spin >/dev/null 2>&1; then
    echo "model: SKIPPED, spin is not installed (Debian: apt-get install spin)"
    exit 0
fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
check() { # check MODEL EXPECTED FLAGS...
    model=$1 expected=$2
    shift 2
    cp "$model.pml" "$tmp/m.pml"
    (cd "$tmp" && rm -f pan* m.pml.trail && spin -a "$@" m.pml >/dev/null &&
        cc -O2 -w -DSAFETY -DCOLLAPSE -DVECTORSZ=2048 -o pan pan.c && ./pan -m1000000 -w24 >out 2>&1 || true)
    if grep -q 'max search depth too small\|out of memory' "$tmp/out"; then
        echo "model: $model $* did not finish"; cat "$tmp/out"; exit 1
    fi
    errors=$(sed -n 's/.*errors: \([0-9]*\).*/\1/p' "$tmp/out")
    states=$(sed -n 's/^ *\([0-9.e+]*\) states, stored.*/\1/p' "$tmp/out")
    case "$expected:$errors" in
        pass:0) echo "model: $model $* holds ($states states)" ;;
        fail:[1-9]*) echo "model: $model $* is caught, as it must be" ;;
        *) echo "model: $model $*: expected to $expected, errors: $errors"; cat "$tmp/out"; exit 1 ;;
    esac
}
check control pass
for broken in PIN_COUNT NO_SEQ NO_DUMPED NO_HEIR; do check control fail "-D$broken"; done
check export pass
for broken in COMMIT_EARLY NO_TXN; do check export fail "-D$broken"; done
