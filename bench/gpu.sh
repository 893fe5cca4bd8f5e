#!/usr/bin/env bash
# What one GPU says of this trainer, in at most 25 minutes: `bash bench/gpu.sh`, raw lines in
# results/gpu.jsonl. `bash bench/gpu.sh --dry` only tries all parts, on a CPU and in tiny shapes.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
failed=0
while read -r part seconds; do
    timeout -k 10 "$seconds" "$python" bench/gpu.py "$part" "$@" </dev/null || {
        echo "$part: failed, or longer than $seconds s" >&2
        failed=1
    }
done <<END
exact-fp32 90
exact-bf16 90
step-2b 90
step-2b-rows 120
step-2b-long 120
step-2b-saving 120
step-7b-lora 180
head 60
gathering 120
server 150
step-7b-whole 360
END
exit $failed
