# Sourced by ./demo and ./test: makes .venv in the repository and installs into it. Needs python3 (3.10 or newer) with venv.
#
# prepare_environment EXTRA [PACKAGE...]
#   installs this tree in editable form with the extra, under constraints.txt, then the packages without their
#   dependencies. Does nothing when .venv already holds exactly that: a stamp in .venv keeps the hash of pyproject.toml,
#   constraints.txt, this file, the tree's place and the Python version. Set PYTHON to choose the interpreter.

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

environment_hash() {
    "$1" - "$2" "$PWD" <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256("\n".join([sys.version, *sys.argv[1:]]).encode())
for name in ("pyproject.toml", "constraints.txt", "scripts/environment.sh"):
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PY
}

prepare_environment() {
    local extra=$1 python stamp wanted
    shift
    stamp=.venv/.installed-$extra
    if [ -x .venv/bin/python ] && [ -f "$stamp" ] && wanted=$(environment_hash .venv/bin/python "$extra $*") \
        && [ "$(cat "$stamp")" = "$wanted" ]; then
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
    say "installing flexiq[$extra] and what it needs (torch is large; the first time takes minutes)"
    rm -f "$stamp"
    .venv/bin/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt -e ".[$extra]"
    if [ $# -gt 0 ]; then
        # torchvision's wheels ask for one particular torch build; flexiq needs only its Python code.
        .venv/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt --no-deps "$@"
    fi
    environment_hash .venv/bin/python "$extra $*" > "$stamp"
}
