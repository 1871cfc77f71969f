#!/usr/bin/env bash
# Check of what a release consists of: the source distribution has all that the checkout has; the
# wheel that is built from it passes the audits of its metadata, contents and binary interfaces, and
# works where nothing of the checkout is in sight. Both are left in dist/. The Makefile calls it.
#
# usage: tools/environment/release_check.sh VENV AUDIT_VENV
#   VENV        the environment with torch and the toolbox
#   AUDIT_VENV  the folder for the environment of the audits
set -euo pipefail
if [ "${1-}" = -h ] || [ "${1-}" = --help ] || [ $# -lt 2 ]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
  [ $# -eq 1 ] && exit 0 || exit 2
fi
[ -x "$1/bin/python" ] || { echo "error: no environment in $1: run make first" >&2; exit 1; }
python=$(cd "$1/bin" && pwd)/python
here=$(cd "$(dirname "$0")" && pwd)
checkout=$(cd "$here/../.." && pwd)
cd "$checkout"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
step() { printf '\n==> %s\n' "$*"; }
fail() {
  echo "error: $*" >&2
  exit 1
}
in_sources() { (cd "$folder/source" && "$@"); }

step "tools of the audits, in $2"
[ -x "$2/bin/python" ] || "$python" -m venv "$2"
audit=$(cd "$2/bin" && pwd)
"$audit/python" -m pip install --quiet --disable-pip-version-check -r "$here/release.txt"

step "source distribution"
backend='import setuptools.build_meta as backend, sys; getattr(backend, sys.argv[1])(sys.argv[2])'
"$python" -c "$backend" build_sdist "$folder" >"$folder/log" 2>&1 || fail "$(cat "$folder/log")"
sdist=$(ls "$folder"/*.tar.gz)
mkdir "$folder/source"
tar -xzf "$sdist" -C "$folder/source" --strip-components 1
# Links are made anew where the package is built; the rest is of use to who has the history only.
git ls-files | grep -vE '^(\.ci/|\.gitignore$|mmdcn/\.mim/)' | sort >"$folder/tracked"
in_sources find . -type f | sed 's,^\./,,' | sort >"$folder/packed"
missing=$(comm -23 "$folder/tracked" "$folder/packed")
[ -z "$missing" ] || fail "MANIFEST.in leaves out: $missing"
strangers=$(comm -13 "$folder/tracked" "$folder/packed" | grep -vE '^(PKG-INFO|setup\.cfg|mmdcn\.egg-info/.*)$' || true)
[ -z "$strangers" ] || fail "the source distribution has what git does not: $strangers"
echo "$(basename "$sdist"): $(wc -l <"$folder/packed") files"

step "wheel, from the source distribution"
# Objects that the checkout's build has left are linked, where they are current.
if ls -d build/temp* >/dev/null 2>&1; then
  mkdir "$folder/source/build" && cp -a build/temp* "$folder/source/build"
fi
in_sources "$python" -m pip wheel --quiet --no-deps --no-build-isolation \
  --wheel-dir "$folder/built" .

step "metadata and contents"
"$audit/twine" check --strict "$sdist" "$folder"/built/*.whl
"$audit/check-wheel-contents" "$folder"/built/*.whl

step "binary interfaces: Python's, torch's, and the platform's"
"$audit/abi3audit" --strict --summary "$folder"/built/*.whl
"$python" -m zipfile -e "$folder"/built/*.whl "$folder/unpacked"
"$audit/torch-abi-audit" --check torch --json "$folder/unpacked/mmdcn" >"$folder/report"
# The audit counts weak symbols, which may be missing, as those that a torch must have.
"$audit/python" - "$folder/report" "$(grep -oP 'torch>=\K[0-9.]+' pyproject.toml)" <<'PYTHON'
import json, sys
from elftools.elf.elffile import ELFFile
report, oldest = json.load(open(sys.argv[1])), sys.argv[2]
for library in report["bundled_libs"]:
    symbols = ELFFile(open(library["path"], "rb")).get_section_by_name(".dynsym").iter_symbols()
    weak = {s.name for s in symbols if s["st_info"]["bind"] == "STB_WEAK"}
    torch = library["torch"]
    newest = tuple(map(int, torch["min_torch_version"].split(".")[:2]))
    needed = set(torch["version_defining_symbols"]) - weak
    if needed and newest > tuple(map(int, oldest.split("."))):
        sys.exit(f"error: {library['path']} needs a torch newer than {oldest}, for {needed}")
    print(f"{library['path'].rpartition('/')[2]}: {torch['stable_shim_count']} symbols of torch, all "
          f"of its stable ABI, none that torch {oldest} lacks")
PYTHON
# The libraries are torch's, and are there where torch is.
PATH=$audit:$PATH "$audit/auditwheel" repair --exclude 'libtorch*' --exclude 'libc10*' \
  --wheel-dir "$folder/repaired" "$folder"/built/*.whl 2>"$folder/log" ||
  fail "$(cat "$folder/log")"
wheel=$(ls "$folder"/repaired/*.whl)
echo "$(basename "$wheel"), for every Linux of that architecture whose glibc is not older"

step "the wheel, installed outside the checkout"
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder/site" \
  "$wheel"
mkdir "$folder/elsewhere"
cp -r "$folder/source/tests" "$folder/source/pyproject.toml" "$folder/elsewhere"
(
  cd "$folder/elsewhere"
  export PYTHONPATH=$folder/site
  "$python" -m mmdcn.check | sed -n '1,/^$/p'
  "$python" -m mmdcn.benchmark ops --shapes 1x8x8x8 --peers dense --seconds 0.01 --no-memory 2>/dev/null
  "$python" -m pytest -q -W ignore -p no:cacheprovider tests/test_installed.py tests/test_functions.py \
    tests/layers/test_arguments.py
)

step "the source distribution, installed for editing"
in_sources "$python" -c "$backend" build_editable "$folder/editable" >"$folder/log" 2>&1 ||
  fail "$(cat "$folder/log")"
(
  cd "$folder/elsewhere"
  PYTHONPATH=$folder/source "$python" -m pytest -q -W ignore -p no:cacheprovider tests/test_installed.py
)

mkdir -p dist
cp "$sdist" "$wheel" dist
printf '\nrelease-check: clean; in dist/:\n  %s\n  %s\n' "$(basename "$sdist")" "$(basename "$wheel")"
