#!/usr/bin/env bash
# Makes the environment and runs the tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python -m pytest "$@"
