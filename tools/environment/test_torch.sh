#!/usr/bin/env bash
# Run of the tests of operators and layers on a built wheel, under another release of torch than
# the one it was built against, in a virtual environment of its own. The Makefile calls it.
#
# usage: tools/environment/test_torch.sh VENV PYTHON TORCH WHEEL [pytest's arguments...]
set -euo pipefail
if [ "${1-}" = -h ] || [ "${1-}" = --help ] || [ $# -lt 4 ]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
  [ $# -eq 1 ] && exit 0 || exit 2
fi
venv=$1 python=$2 torch=$3 wheel=$4
shift 4
here=$(realpath "$(dirname "$0")")

fail() {
  echo "error: $*" >&2
  exit 1
}
[ -n "$torch" ] || fail "TORCH: expected a release of torch, as in \`make test-torch TORCH=2.10.0\`"
wheel=$(realpath "$wheel")

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
venv=$(realpath "$venv")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
grep -v '^torch==' "$here/constraints.txt" >"$folder/constraints.txt"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
echo "==> torch $torch and the test tools in $venv (a download of up to a few gigabytes)"
"${pip[@]}" -c "$folder/constraints.txt" "torch==$torch" numpy psutil -r "$here/torch.txt"
"${pip[@]}" --no-deps --force-reinstall "$wheel"

# The tests run in a folder without the package's sources, so that they test what was installed.
cp -r "$here/../../tests" "$here/../../pyproject.toml" "$folder"
cd "$folder"
"$venv/bin/python" -m mmdcn.check
"$venv/bin/python" -m pytest -m "not slow and not cuda" tests/ops tests/layers tests/pytorch "$@"
