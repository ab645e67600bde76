#!/usr/bin/env bash
# Compiles the CPU engine with the address and undefined-behaviour sanitizers and runs tests against that build.
#   scripts/sanitize.sh                              the tests marked "sanitize" in tests/engines/cpu
#   scripts/sanitize.sh tests/engines/cpu -k winograd  arguments go to pytest instead
#   scripts/sanitize.sh --build-only                 prints the path of the extension and stops
# Any finding ends the run with an error. Only bitdial's own compiled code is watched, and leaks are not looked for: Python keeps
# memory until its end.
#
# Environment: PYTHON (default .venv/bin/python, made if need be), CXX, BITDIAL_SANITIZE_DIR (default build/sanitize).
# The tests see BITDIAL_SANITIZED_NATIVE, the path of the extension that they must have loaded.
# Exit code 77: this machine has no compiler, or its compiler has no sanitizer runtime; nothing was tested.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

case ${1:-} in
    -h | --help) sed -n '2,12s/^# \{0,1\}//p' scripts/sanitize.sh; exit 0 ;;
esac

skip() { echo "error: $*; nothing was tested" >&2; exit 77; }

# The runtime must be the first library of the process. Clang has two names for it, GCC's may be a linker script.
find_runtime() {
    local name path names=(libasan.so)
    if "$1" --version | grep -qi clang; then
        names=("libclang_rt.asan-$(uname -m).so" libclang_rt.asan.so)
    fi
    for name in "${names[@]}"; do
        path=$("$1" -print-file-name="$name") || continue
        [ -f "$path" ] || continue
        if grep -qa '^INPUT' "$path"; then
            path=$(sed -n 's/^INPUT *( *\([^ )]*\).*/\1/p' "$path")
        fi
        printf '%s\n' "$path"
        return 0
    done
    return 1
}

compiler=$(find_compiler) || skip "no C++ compiler was found"
runtime=$(find_runtime "$compiler") || skip "$compiler has no address sanitizer (its package is libasan, or compiler-rt for Clang)"

if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
else
    prepare_environment dev torchvision timm >&2
    python=$PWD/.venv/bin/python
fi
PATH=$(dirname "$python"):$PATH  # cmake and ninja may lie there
place=${BITDIAL_SANITIZE_DIR:-build/sanitize}
mkdir -p "$place"
place=$(cd "$place" && pwd)
command -v cmake >/dev/null || skip "CMake was not found"
# Exceptions are intercepted, and python itself does not bring the C++ library that throws them.
standard=$("$compiler" -print-file-name=libstdc++.so.6)

if command -v flock >/dev/null; then  # two runs at once would build into each other
    exec 9> "$place/.lock"
    flock 9
fi
generator=()
if [ ! -f "$place/cmake/CMakeCache.txt" ] && command -v ninja >/dev/null; then
    generator=(-G Ninja)
fi
jobs=${CMAKE_BUILD_PARALLEL_LEVEL:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)}
{
    CXX=$compiler cmake -S . -B "$place/cmake" ${generator[@]+"${generator[@]}"} -DCMAKE_BUILD_TYPE=Release \
        -DBITDIAL_SANITIZE=ON -DPython_EXECUTABLE="$(command -v "$python")"
    cmake --build "$place/cmake" --parallel "$jobs"
} > "$place/build.log" 2>&1 || { cat "$place/build.log" >&2; exit 1; }
native=$(echo "$place"/cmake/_native.*.so)

# Python loads sitecustomize at its start, in child processes too. It puts this extension in the place of the installed one.
mkdir -p "$place/site"
cat > "$place/site/sitecustomize.py" <<'PY'
import importlib.machinery
import importlib.util
import os
import sys


class SanitizedNative:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "bitdial.engines.cpu._native":
            return None
        file = os.environ["BITDIAL_SANITIZED_NATIVE"]
        loader = importlib.machinery.ExtensionFileLoader(name, file)
        return importlib.util.spec_from_file_location(name, file, loader=loader)


sys.meta_path.insert(0, SanitizedNative)
PY
if command -v flock >/dev/null; then
    flock -u 9
    exec 9>&-
fi
if [ "${1:-}" = --build-only ]; then
    printf '%s\n' "$native"
    exit 0
fi
[ $# -gt 0 ] || set -- tests/engines/cpu -m sanitize

export BITDIAL_SANITIZED_NATIVE=$native
export PYTHONPATH=$place/site:$PWD/src${PYTHONPATH:+:$PYTHONPATH}
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:halt_on_error=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# -s: a finding is printed by the process that it ends, which captured output would swallow.
LD_PRELOAD="$runtime $standard" exec "$python" -m pytest -p no:cacheprovider -q -s "$@"
