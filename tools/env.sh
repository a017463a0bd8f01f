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

# uv takes half the time of pip. It is told what pip is told, and compiles modules as pip does: many processes load them, and
# may be forbidden to keep what they compile. Where it cannot be had, pip does it.
install() {
    local pip="$1 -m pip --disable-pip-version-check" setting
    shift
    pip_says() { $pip config list | sed -n "s/^[^=]*\.$1='\(.*\)'$/\1/p" | tr -s ' ' '\n' | sort -u | paste -sd "$2"; }
    if $pip install -qq uv 2>/dev/null; then
        setting=$(pip_says index-url ' ')
        UV_FIND_LINKS=$(pip_says find-links ,) UV_INDEX=$(pip_says extra-index-url ' ') UV_INDEX_STRATEGY=unsafe-best-match \
            ${pip%% *} -m uv pip install -q --compile-bytecode ${setting:+--default-index "$setting"} "$@" && return
    fi
    $pip install -qq "$@"
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
    install .venv/bin/python -e '.[test]'
    echo "$wanted" >.venv/made-for
}

if [[ -n "${KERNELGEN_PYTHON:-}" ]]; then
    python=$KERNELGEN_PYTHON
else
    make_venv
    python=$PWD/.venv/bin/python
fi
