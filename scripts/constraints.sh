#!/usr/bin/env bash
# Rewrite constraints.txt: names and versions only, no addresses, no local paths.
set -euo pipefail
cd "$(dirname "$0")/.."

uv=uv
"$uv" --version >/dev/null 2>&1 || uv=.venv/bin/uv
new=$(mktemp)
trap 'rm -f "$new"' EXIT
keep=(-c constraints.txt)
if [ "${1:-}" = --upgrade ]; then keep=(); fi
echo "# Names and versions only; written by 'make constraints'. Upgrade: 'make constraints UPGRADE=1', then 'make test'." >"$new"
"$uv" pip compile pyproject.toml --all-extras "${keep[@]}" --python .venv/bin/python --quiet \
    --no-annotate --no-header | grep -E '^[A-Za-z0-9._-]+==[^ ]+' | grep -vE '^(pip|uv)==' >>"$new"
install -m 644 "$new" constraints.txt
