# Sourced by the other scripts: makes .venv once and activates it. Needs nothing but Python 3.11+.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

environment="${OTPIPE_VENV:-.venv}"
stamp="$environment/.otpipe-installed"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ launch/constraints.txt -nt "$stamp" ]; then
    python=""
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
            2>/dev/null; then
            python="$candidate"
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "otpipe: no Python 3.11 or newer was found; install one, or name it in PYTHON" >&2
        exit 1
    fi
    echo "otpipe: making the environment in $environment (once)" >&2
    "$python" -m venv "$environment"
    # torch first and alone: with it in place, nothing else pulls another build of it.
    "$environment/bin/pip" install --quiet --disable-pip-version-check -c launch/constraints.txt torch
    "$environment/bin/pip" install --quiet --disable-pip-version-check -c launch/constraints.txt \
        --editable ".[test]"
    touch "$stamp"
fi
# shellcheck disable=SC1091
source "$environment/bin/activate"
