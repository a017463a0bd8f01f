# Sourced by the other tools: goes to the repository and sets $python to one that has kernelgen and its test extra.
#
# It is that of .venv, which is made when it is missing, and again when pyproject.toml, the folder or the Python changed.
# KERNELGEN_PYTHON names another one to use as it is, on a machine that reaches no package index, for instance.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

newest_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "needs Python 3.10 or newer as python3" >&2
    return 2
}

make_venv() {
    local base wanted
    base=$(newest_python)
    wanted="$("$base" --version) in $PWD, pyproject.toml $(cksum <pyproject.toml)"
    if [[ -f .venv/made-for && "$(<.venv/made-for)" == "$wanted" ]]; then
        return
    fi
    echo "making .venv (once, some minutes)" >&2
    "$base" -m venv --clear .venv
    .venv/bin/python -m pip install -qq --disable-pip-version-check -e '.[test]'
    echo "$wanted" >.venv/made-for
}

if [[ -n "${KERNELGEN_PYTHON:-}" ]]; then
    python=$KERNELGEN_PYTHON
else
    make_venv
    python=$PWD/.venv/bin/python
fi
