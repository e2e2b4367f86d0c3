#!/usr/bin/env bash
# A fine-tuned checkpoint of one's own: a .pth as training scripts save it, with their wrappings around the weights.
# The Python below makes one of the demo's model, in place of your training. vitq reads tensors only (no code is run from a .pth),
# and takes off `state_dict`, `model`, `model_ema` and `module.`; what the weights do not say goes into options or config.json.
#
#   bash examples/finetuned.sh [RUN_DIR]       needs `vitq` on the path: source setup.sh
set -euo pipefail
run="${1:-finetuned-run}" data="$(dirname "${BASH_SOURCE[0]}")/../vitq/demo_data"
mkdir -p "$run"

python - "$data/vit_cifar10/model.safetensors" "$run/checkpoint.pth" <<'PYTHON'
import sys, torch
from safetensors.torch import load_file
weights = load_file(sys.argv[1])
torch.save({"epoch": 30, "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}, sys.argv[2])
PYTHON

# 1. By options. Class folders are taken in alphabetical order, as torchvision and timm do; --num-classes is found by the head if left out.
arguments=(--model-kwargs img_size=32 --model-kwargs patch_size=4 --model-kwargs embed_dim=128 --model-kwargs depth=12 --model-kwargs num_heads=4)
vitq show "$run/checkpoint.pth" --arch vit_tiny_patch16_224 --num-classes 10 "${arguments[@]}" | sed -n 1,3p

# 2. By a config.json beside it, which also holds what no option does: your preprocessing and the names of your classes, in the head's order.
cat >"$run/config.json" <<'JSON'
{
  "architecture": "vit_tiny_patch16_224",
  "num_classes": 10,
  "model_args": {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 12, "num_heads": 4},
  "pretrained_cfg": {
    "input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 1.0,
    "mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616],
    "label_names": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
  }
}
JSON
vitq evaluate "$run/checkpoint.pth" --images "$data/test.tar" --num-images 200
vitq profile "$run/checkpoint.pth" --images "$data/calibration.tar" --num-images 64 --run-dir "$run" --force
vitq allocate --budget 4.0 --run-dir "$run" --force
vitq calibrate --run-dir "$run" --force
vitq export --run-dir "$run" --force
vitq evaluate "$run/model.onnx" --images "$data/test.tar" --num-images 200
