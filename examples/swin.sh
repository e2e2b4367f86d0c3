#!/usr/bin/env bash
# A Swin through the whole chain, no other than a ViT: here a small one with random weights, since no trained one comes with vitq.
# Its agreement is therefore that of answers close to a tie; give your own folder, checkpoint or timm name in place of MODEL.
#
#   bash examples/swin.sh [RUN_DIR]       needs `vitq` on the path: source setup.sh
set -euo pipefail
run="${1:-swin-run}" data="$(dirname "${BASH_SOURCE[0]}")/../vitq/demo_data" model="${1:-swin-run}/model"

python - "$model" <<'PYTHON'
"""A timm local folder, as timm.models.save_for_hf writes it: config.json beside model.safetensors."""
import json, pathlib, sys, timm, torch
from safetensors.torch import save_file
torch.manual_seed(0)
arguments = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 48, "depths": [2, 2, 2], "num_heads": [2, 4, 8]}
module = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **arguments)
for parameter in module.parameters():
    parameter.data += 0.02 * torch.randn_like(parameter)
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
save_file(module.state_dict(), folder / "model.safetensors")
config = {"architecture": "swin_tiny_patch4_window7_224", "num_classes": 10, "model_args": arguments}
(folder / "config.json").write_text(json.dumps(config))
PYTHON

vitq show "$model" | sed -n 1,12p
vitq profile "$model" --images "$data/calibration.tar" --num-images 64 --run-dir "$run" --force
vitq allocate --budget like=4 --run-dir "$run" --force # no larger and no more BitOps than 4 bits everywhere
vitq calibrate --run-dir "$run" --force
vitq export --run-dir "$run" --force
vitq evaluate "$run/model.onnx" --images "$data/test.tar" --num-images 200
