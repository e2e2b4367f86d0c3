#!/usr/bin/env bash
# A latency budget: the layers measured on this machine, then the best bits that are predicted to stay within the milliseconds.
# onnxruntime computes every width in 8 bits, and what is narrower costs extra ops, so the fewest bits are not the fastest. Here the
# budget lies halfway between 8 bits everywhere and the narrowest, and the size is limited too.
#
#   bash examples/latency_budget.sh [RUN_DIR]       needs `vitq` on the path: source setup.sh
set -euo pipefail
run="${1:-latency-run}" data="$(dirname "${BASH_SOURCE[0]}")/../vitq/demo_data"

vitq profile "$data/vit_cifar10" --images "$data/calibration.tar" --num-images 64 --run-dir "$run" --force
vitq bench --layers --threads 1 --rounds 20 --run-dir "$run" # latency.json: every layer at 8 bits and below, and whole models

milliseconds="$(python - "$run/latency.json" <<'PYTHON'
import json, sys
whole = json.load(open(sys.argv[1]))["made_from"]["whole_ms"]
print(f"{(whole['8'] + whole['below']) / 2:.3f}")
PYTHON
)"
vitq allocate --budget "latency=${milliseconds}ms" --budget size=2.2MB --run-dir "$run" --force
vitq calibrate --run-dir "$run" --force
vitq export --run-dir "$run" --force
vitq bench "$run/model.onnx" --threads 1 --rounds 100
