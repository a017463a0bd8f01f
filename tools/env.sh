# Sourced by the other tools: goes to the repository and sets $python to one that has kernelgen and its test extra.
#
# It is that of .venv, with exactly what tools/requirements/ says, which tools/lock renews. It is made when it is missing, and
# again when what it is made from changed. With latest=yes it is that of .venv-latest, made anew with the newest releases that
# pyproject.toml allows (torch stays). KERNELGEN_PYTHON names another one to use as it is: where no package index can be
# reached, or for a GPU of AMD.
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

# The values of a setting of pip, with $2 between them.
pip_says() { "$python" -m pip config list | sed -n "s/^[^=]*\.$1='\(.*\)'$/\1/p" | tr -s ' ' '\n' | sort -u | paste -sd "$2"; }

# uv looks where pip is told to look, and compiles modules as pip does: many processes load them, and may be forbidden to keep
# what they compile.
install() {
    local index
    index=$(pip_says index-url ' ')
    UV_FIND_LINKS=$(pip_says find-links ,) UV_INDEX=$(pip_says extra-index-url ' ') UV_INDEX_STRATEGY=unsafe-best-match \
        "$python" -m uv pip install -q --no-config --compile-bytecode ${index:+--default-index "$index"} "$@"
}

# The build of torch for a CPU is in no package index, but may be where pip is told to look; if not, uv knows where it is.
install_torch() {
    local cpu=(--no-deps -r tools/requirements/cpu.txt)
    if nvidia-smi -L >/dev/null 2>&1; then
        install --no-deps --require-hashes -r tools/requirements/gpu.txt
    else
        install "${cpu[@]}" 2>/dev/null || install --torch-backend cpu "${cpu[@]}"
    fi
}

make_venv() {
    local folder=$1 base wanted
    base=$(newest_python)
    wanted="$("$base" --version) in $PWD, $(cat pyproject.toml tools/env.sh tools/requirements/*.txt | cksum)"
    if [[ -z "${latest:-}" && -f $folder/made-for && "$(<"$folder/made-for")" == "$wanted" ]]; then
        return
    fi
    echo "making $folder (a minute or some)" >&2
    "$base" -m venv --clear "$folder"
    "$python" -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r tools/requirements/uv.txt
    install_torch
    if [[ -n "${latest:-}" ]]; then
        install hatchling editables
        install --no-build-isolation --upgrade-package triton -e '.[test]'
    else
        install --no-deps --require-hashes -r tools/requirements/base.txt
        install --no-deps --no-build-isolation -e .
    fi
    echo "$wanted" >"$folder/made-for"
}

if [[ -n "${KERNELGEN_PYTHON:-}" && -n "${latest:-}" ]]; then
    echo "--latest makes an environment: unset KERNELGEN_PYTHON" >&2
    exit 2
elif [[ -n "${KERNELGEN_PYTHON:-}" ]]; then
    python=$KERNELGEN_PYTHON
else
    venv=.venv${latest:+-latest}
    python=$PWD/$venv/bin/python
    make_venv "$venv"
fi
