# Sourced by ./demo, ./test and scripts/sanitize.sh: makes .venv in the repository and installs into it. Needs python3 (3.10 or
# newer) with venv, and for the CPU engine a C++ compiler.
#
# prepare_environment EXTRA [PACKAGE...]
#   installs this tree in editable form with the extra, under constraints.txt, then the packages without their
#   dependencies. Does nothing when .venv already holds exactly that: a stamp in .venv keeps the hash of pyproject.toml,
#   constraints.txt, this file, the tree's place and the Python version. Set PYTHON to choose the interpreter.
#   Compiles the CPU engine anew, as far as needed, when csrc or what builds it has changed: a second stamp keeps that hash.
#   Where it does not compile, all else is installed and a line says so; with BITDIAL_REQUIRE_NATIVE=1 that is an error.
#   Calls build_tools_ready, where the caller has such a function, as soon as .venv holds what compiling needs.

# Bytecode of what is imported is kept in .venv, whatever the caller's setting: of the many processes of the tests each would
# compile it anew. pip would compile every file of torch and the others, most of which nobody imports.
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX=$PWD/.venv/pycache

say() { printf '== %s\n' "$*"; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return 0
        fi
        if [ -n "${PYTHON:-}" ]; then
            echo "error: PYTHON=$PYTHON does not run, or is older than 3.10" >&2
            return 1
        fi
    done
    echo "error: no Python 3.10 or newer found; install one, or set PYTHON to its path" >&2
    return 1
}

find_compiler() {
    local candidate
    for candidate in ${CXX:-c++ g++ clang++}; do
        if command -v "$candidate" 2>/dev/null; then
            return 0
        fi
    done
    return 1
}

native_required() {
    case ${BITDIAL_REQUIRE_NATIVE:-} in
        "" | 0 | [nN] | [nN][oO] | [oO][fF][fF] | [fF] | [fF][aA][lL][sS][eE]) return 1 ;;
    esac
}

environment_hash() {
    "$1" - "$2" "$PWD" <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256("\n".join([sys.version, *sys.argv[1:]]).encode())
for name in ("pyproject.toml", "constraints.txt", "scripts/environment.sh"):
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PY
}

# What the compiled extension depends on. The compiler belongs to it: one installed later gets its chance.
native_hash() {
    local compiler
    compiler=$(find_compiler) || compiler=none
    .venv/bin/python - "$compiler $("$compiler" --version 2>/dev/null) ${CXXFLAGS:-} ${CMAKE_ARGS:-}" <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256(sys.argv[1].encode())
named = ("CMakeLists.txt", "pyproject.toml", "constraints.txt", "scripts/build_backend.py", "src/bitdial/_version.py")
for path in [*map(pathlib.Path, named), *sorted(p for p in pathlib.Path("csrc").rglob("*") if p.is_file())]:
    digest.update(f"{path}\0{path.stat().st_size}\0".encode() + path.read_bytes())
print(digest.hexdigest())
PY
}

pip_install() {
    .venv/bin/python -m pip install --disable-pip-version-check --no-compile --quiet -c constraints.txt "$@"
}

# Imports the extension, which must be the installed one: a copy left in src by hand would hide that nothing was compiled.
load_installed_native() {
    .venv/bin/python - <<'PY'
import pathlib
from bitdial.engines.cpu import _native
file = pathlib.Path(_native.__file__).resolve()
if pathlib.Path("src").resolve() in file.parents:
    raise SystemExit(f"{file} lies among the sources: delete it")
PY
}

# build_and_install REQUIREMENT [OPTION...]: this tree in editable form, with the build tools that lie in .venv, so that
# their versions are the constraints' and the compiled files stay valid from one build to the next.
build_and_install() {
    local level=lenient hash
    # What ./test has compiled, with warnings as errors, stays that for ./demo: otherwise each would compile all of it anew.
    if [ -z "${BITDIAL_REQUIRE_NATIVE:-}" ] && BITDIAL_REQUIRE_NATIVE=1 native_is_current; then
        local -x BITDIAL_REQUIRE_NATIVE=1
    fi
    hash=$(native_hash)
    native_required && level=strict
    rm -f .venv/.native
    CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)} \
        pip_install --no-build-isolation --progress-bar on "${@:2}" -e "$1"
    if ! load_installed_native 2>/dev/null; then
        if native_required; then
            echo "error: the CPU engine compiled but does not load:" >&2
            load_installed_native >&2 || true
            return 1
        fi
        level=none
        say "the CPU engine is MISSING: it did not compile$(find_compiler >/dev/null || echo ', no C++ compiler was found')"
        say "all else works; BITDIAL_REQUIRE_NATIVE=1 makes that an error and shows the reason"
    fi
    printf '%s %s\n' "$hash" "$level" > .venv/.native
}

# Whether .venv holds the extension of these sources. ./test wants it compiled with warnings as errors, ./demo takes any.
native_is_current() {
    local hash level
    read -r hash level 2>/dev/null < .venv/.native || return 1
    [ "$hash" = "$(native_hash)" ] || return 1
    [ "$level" = strict ] || ! native_required
}

prepare_environment() {
    local extra=$1 python stamp wanted
    shift
    if native_required && ! find_compiler >/dev/null; then
        echo "error: no C++ compiler found (${CXX:-c++, g++, clang++}): install GCC 9 or newer, or Clang;" \
            "BITDIAL_REQUIRE_NATIVE=0 goes without the CPU engine" >&2
        return 1
    fi
    stamp=.venv/.installed-$extra
    if [ -x .venv/bin/python ] && [ -f "$stamp" ] && wanted=$(environment_hash .venv/bin/python "$extra $*") \
        && [ "$(cat "$stamp")" = "$wanted" ]; then
        if ! native_is_current; then
            say "compiling the CPU engine"
            build_and_install . --no-deps
        fi
        return 0
    fi
    # An environment of another Python, of another place or half made is made anew.
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1 || [ "$(cat .venv/.place 2>/dev/null)" != "$PWD" ]; then
        python=$(find_python)
        say "making .venv with $("$python" --version)"
        if ! "$python" -m venv --clear .venv; then
            echo "error: $python cannot make a virtual environment; install its venv module (python3-venv on Debian)" >&2
            return 1
        fi
        printf '%s\n' "$PWD" > .venv/.place
    fi
    say "installing bitdial[$extra] and what it needs (torch is large; the first time takes minutes)"
    rm -f "$stamp"
    pip_install scikit-build-core nanobind
    if find_compiler >/dev/null; then
        command -v cmake >/dev/null || pip_install cmake
        command -v ninja >/dev/null || pip_install ninja
    fi
    ! declare -F build_tools_ready >/dev/null || build_tools_ready
    build_and_install ".[$extra]"
    if [ $# -gt 0 ]; then
        # torchvision's wheels ask for one particular torch build; bitdial needs only its Python code.
        pip_install --no-deps "$@"
    fi
    environment_hash .venv/bin/python "$extra $*" > "$stamp"
}
