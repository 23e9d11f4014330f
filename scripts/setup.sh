#!/usr/bin/env bash
# Build .venv (Python 3.12, pinned packages) and see to it that MuJoCo can render without a screen.
# Safe to run again at any time. Called by the Makefile.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
fail() { printf 'set-up: %s\n' "$*" >&2; exit 1; }
is_312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }

# A `uv` on PATH may be a pyenv shim that knows no uv for the pinned Python, so it has to prove that it runs.
uv_works() { "$1" --version >/dev/null 2>&1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

make_venv() {
    local python
    if [ -x .venv/bin/python ]; then
        is_312 .venv/bin/python && return
        fail ".venv holds another Python than 3.12; move it away and run make again"
    fi
    for python in python3.12 python python3; do
        if is_312 "$python"; then
            say "Creating .venv with $python"
            # Debian's python3 may lack ensurepip; uv needs no pip inside the environment.
            "$python" -m venv .venv && return
            rm -rf .venv
            uv_works uv && uv venv --python "$python" .venv && return
            fail "'$python -m venv' failed; try: apt-get install -y python3.12-venv"
        fi
    done
    uv_works uv && uv venv --python 3.12 .venv && return
    fail "no Python 3.12 found; install it (apt-get install -y python3.12 python3.12-venv, 'pyenv install 3.12' or uv)"
}

install_packages() {
    local uv=uv
    if ! uv_works "$uv"; then
        uv=.venv/bin/uv
        uv_works "$uv" || .venv/bin/python -m pip install --quiet uv || fail "could not install uv into .venv"
    fi
    say "Installing packages (about 7 GB, most of it PyTorch)"
    # --compile-bytecode: without it the first import of LeRobot costs 20 s of CPU, and every one does
    # where PYTHONDONTWRITEBYTECODE is set.
    "$uv" pip install --python .venv/bin/python --compile-bytecode -c constraints.txt -e "${1:-.[dev,libero,openvla,diffusion,low-memory,scale,serve,serve-lerobot]}"
}

# Tests drive the real client of openpi, which wants an older numpy (and forgets to name typing_extensions).
install_openpi_client() {
    local uv=uv place=.venv/openpi
    uv_works "$uv" || uv=.venv/bin/uv
    [ -x "$place/bin/python" ] || "$uv" venv --quiet --python .venv/bin/python "$place" || return 1
    "$uv" pip install --quiet --python "$place/bin/python" openpi-client==0.1.2 typing_extensions
}

renders() {
    MUJOCO_GL=$1 .venv/bin/python - >/dev/null 2>&1 <<'PY'
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><light/><geom size='.1'/></worldbody></mujoco>")
renderer = mujoco.Renderer(model, 32, 32)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer.update_scene(data)
renderer.render()
PY
}

check_rendering() {
    renders egl && return
    local packages=(libegl1 libgl1 libosmesa6)
    if command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; then
        say "Installing ${packages[*]} (rendering without a screen)"
        as_root apt-get update -qq || true
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${packages[@]}" >/dev/null || true
        renders egl && return
    fi
    if renders osmesa; then
        say "EGL does not work here, OSMesa does: set MUJOCO_GL=osmesa"
        return
    fi
    say "MuJoCo cannot render here. Install the system libraries, then run make again:"
    say "    sudo apt-get update && sudo apt-get install -y ${packages[*]}"
    exit 1
}

make_venv
install_packages "$@"
install_openpi_client || say "openpi-client could not be installed: its tests will be skipped"
check_rendering
