#!/usr/bin/env bash
# Private generations from start to finish on this machine: two ranks, the bundled model, a client.
# First with private weights (V3-OT), then with public ones.
# PROMPT changes the prompt; TOKENS and PUBLIC_TOKENS how much is generated in each mode.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prompt="${PROMPT:-And it came to pass in those days, that}"
tokens="${TOKENS:-16}"
public_tokens="${PUBLIC_TOKENS:-80}"
work="$(mktemp -d)"
server=""
stop_server() {
    [ -n "$server" ] && kill "$server" 2>/dev/null && wait "$server" 2>/dev/null || true
    server=""
}
finish() {
    stop_server
    rm -rf "$work"
}
trap finish EXIT

# start_server WEIGHTS: sets `address`.
start_server() {
    echo "== server: two ranks, bundled sample model, $1 weights"
    torchrun --nproc_per_node=2 --master_port=0 --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:0 \
        -m otpipe.serve --model sample --weights "$1" --port 0 --audit \
        >"$work/ready" 2>"$work/log" &
    server=$!
    until grep -q 'otpipe: ready on' "$work/ready"; do
        if ! kill -0 "$server" 2>/dev/null; then
            echo "otpipe: the server did not start:" >&2
            cat "$work/log" >&2
            exit 1
        fi
        sleep 0.2
    done
    address="$(sed -n 's/^otpipe: ready on //p' "$work/ready")"
    grep 'rank [0-9]* holds' "$work/log"
    echo "   ready on $address"
}

# run_client SLOTS TOKENS: prepares, then generates.
run_client() {
    echo "== client: prepares pads (no prompt is involved)"
    otpipe prepare --server "$address" --store "$work/store" --slots "$1"
    echo "== client: generates privately"
    echo "   prompt: $prompt"
    otpipe generate --server "$address" --store "$work/store" --prompt "$prompt" \
        --max-new-tokens "$2"
}

start_server private
run_client 64 "$tokens"
stop_server
grep 'the server saw' "$work/log"
echo

start_server public
run_client 256 "$public_tokens"
stop_server
grep 'the server saw' "$work/log"
