#!/usr/bin/env bash
# Compiles the CPU engine for 64-bit ARM and tests it under emulation: correctness alone, an emulator says nothing about speed.
#   scripts/arm.sh                               detection on three processors, whole networks, and the quick tests of kernels
#   scripts/arm.sh tests/engines/cpu/simple -x   arguments go to pytest instead (tests that need no torch)
# The extension is a cross compiler's; a Python for ARM with the packages that loading an artifact needs runs it in QEMU. Networks are
# quantized here, their artifacts and the reference engine's answers go over. About 10 minutes the first time on 2 cores, then 5.
#
# Needs, on Debian: apt-get install g++-aarch64-linux-gnu qemu-user. ARM's Python comes from the same package servers through apt-get,
# into build/arm: nothing is installed, and apt's own lists stay as they are.
# Environment: PYTHON (default .venv/bin/python, made if need be), BITDIAL_ARM_DIR (default build/arm).
# Exit code 77: the cross compiler, the emulator or packages for ARM are not to be had; nothing was tested.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

case ${1:-} in
    -h | --help) sed -n '2,12s/^# \{0,1\}//p' scripts/arm.sh; exit 0 ;;
esac

skip() { echo "error: $*; NOTHING WAS TESTED" >&2; exit 77; }
for tool in aarch64-linux-gnu-g++ qemu-aarch64 apt-get dpkg-deb; do
    command -v $tool > /dev/null || skip "$tool was not found (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)"
done
if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
else
    prepare_environment dev torchvision timm >&2
    python=$PWD/.venv/bin/python
fi
PATH=$(dirname "$python"):$PATH  # cmake and ninja may lie there
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
place=${BITDIAL_ARM_DIR:-build/arm}
mkdir -p "$place"
place=$(cd "$place" && pwd)

# Python for ARM: of the same version, since the extension's borders with it are.
if [ ! -x "$place/root/usr/bin/python$version" ]; then
    say "fetching Python $version for ARM"
    mkdir -p "$place"/apt/{state/lists/partial,cache/archives/partial}
    : > "$place/apt/status"
    options=(-qq -o "Dir::State=$place/apt/state" -o "Dir::State::status=$place/apt/status" -o "Dir::Cache=$place/apt/cache"
        -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Debug::NoLocking=1 -o "APT::Sandbox::User=$(id -un)")
    { apt-get "${options[@]}" update && apt-get "${options[@]}" install --download-only --no-install-recommends -y \
        "python$version" "libpython$version-dev" libstdc++6; } > "$place/apt.log" 2>&1 \
        || skip "apt-get has no Python $version for ARM ($place/apt.log)"
    rm -rf "$place/unpacked"
    for package in "$place"/apt/cache/archives/*.deb; do dpkg-deb -x "$package" "$place/unpacked"; done
    rm -rf "$place/root"
    mv "$place/unpacked" "$place/root"
fi
# Its headers alone: the C library's are the cross compiler's.
mkdir -p "$place/include/aarch64-linux-gnu"
ln -sfn "$place/root/usr/include/python$version" "$place/include/python$version"
ln -sfn "$place/root/usr/include/aarch64-linux-gnu/python$version" "$place/include/aarch64-linux-gnu/python$version"
if [ ! -f "$place/site/.complete" ]; then
    say "fetching packages for ARM"
    platforms=()
    for old in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do platforms+=(--platform "${old}_aarch64"); done
    rm -rf "$place/site"
    "$python" -m pip install --quiet --disable-pip-version-check --target "$place/site" "${platforms[@]}" --python-version "$version" \
        --only-binary=:all: -c constraints.txt numpy safetensors pydantic typer rich pytest hypothesis > "$place/pip.log" 2>&1 \
        || skip "pip has no packages for ARM ($place/pip.log)"
    : > "$place/site/.complete"
fi

say "compiling for ARM"
generator=()
if [ ! -f "$place/cmake/CMakeCache.txt" ] && command -v ninja > /dev/null; then generator=(-G Ninja); fi
{
    cmake -S . -B "$place/cmake" ${generator[@]+"${generator[@]}"} -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux \
        -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CXX_FLAGS="-isystem $place/include" \
        -DPython_EXECUTABLE="$(command -v "$python")" -DPython_INCLUDE_DIR="$place/include/python$version"
    cmake --build "$place/cmake" --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)}"
} > "$place/build.log" 2>&1 || { cat "$place/build.log" >&2; exit 1; }
rm -rf "$place/lib"
mkdir -p "$place/lib"
cp -rs "$PWD/src/bitdial" "$place/lib/"
cp "$place"/cmake/_native.*.so "$place/lib/bitdial/engines/cpu/_native.so"

# on_arm PROCESSOR ARGUMENT...: Python on such a processor.
on_arm() {
    PYTHONPATH=$place/lib:$place/site PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1 OPENBLAS_NUM_THREADS=1 \
        HYPOTHESIS_STORAGE_DIRECTORY=$place/hypothesis qemu-aarch64 -cpu "$1" -L "$place/root" "$place/root/usr/bin/python$version" "${@:2}"
}
# No conftest.py above the engine's own: it wants torch. The profile "ci" knows no deadlines.
pytest_on_arm() {
    on_arm max -m pytest -p no:cacheprovider -q --confcutdir=tests/engines/cpu --hypothesis-profile=ci "$@"
}
if [ $# -gt 0 ]; then
    pytest_on_arm "$@"
    exit
fi

say "instruction sets by processor"
while read -r processor sets; do
    found=$(on_arm "$processor" -c 'from bitdial.engines.cpu import native; print(*native.isas())')
    echo "$processor: $found"
    [ "$found" = "$sets" ] || { echo "error: $processor has $sets" >&2; exit 1; }
done <<'PROCESSORS'
max i8mm dotprod neon portable
cortex-a76 dotprod neon portable
cortex-a53 neon portable
PROCESSORS
say "whole networks"
rm -rf "$place/networks"
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" scripts/arm_networks.py make "$place/networks"
on_arm max scripts/arm_networks.py check "$place/networks"
say "kernels"
pytest_on_arm tests/engines/cpu/test_cpu_kernels.py tests/engines/cpu/test_cpu_training_steps.py tests/engines/cpu/simple -m "sanitize"
say "ARM: ok"
