#!/usr/bin/env bash
# A private generation from start to finish on this machine: two ranks, the bundled model, a client.
# PROMPT and TOKENS change what is generated.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prompt="${PROMPT:-And it came to pass in those days, that}"
tokens="${TOKENS:-80}"
work="$(mktemp -d)"
server=""
finish() {
    [ -n "$server" ] && kill "$server" 2>/dev/null && wait "$server" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT

echo "== server: two ranks, bundled sample model, public weights"
torchrun --nproc_per_node=2 --master_port=0 --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:0 \
    -m otpipe.serve --model sample --weights public --port 0 --audit \
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

echo "== client: prepares pads (no prompt is involved)"
otpipe prepare --server "$address" --store "$work/store" --slots 256

echo "== client: generates privately"
echo "   prompt: $prompt"
otpipe generate --server "$address" --store "$work/store" --prompt "$prompt" \
    --max-new-tokens "$tokens" --temperature 0.8 --top-p 0.9

kill "$server"
wait "$server" 2>/dev/null || true
server=""
grep 'the server saw' "$work/log"
