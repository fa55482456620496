#!/usr/bin/env bash
# torch 2.13.0 (2.15.0 alike), accelerate 1.15.0: on CPUs accelerate takes an FSDP plugin and doesn't use it: two processes train
# with DDP, each with all parameters. Started by `accelerate launch --use_fsdp`, two processes train alone. Nothing warns.
#
# AcceleratorState keeps the plugin, and becomes FSDP, only in a branch for MULTI_GPU and other accelerators' types. MULTI_CPU isn't
# among them, so the type remains MULTI_CPU, state.fsdp_plugin is never set, and prepare() wraps the model in
# DistributedDataParallel. The variables that `accelerate launch` sets (ACCELERATE_USE_FSDP, FSDP_VERSION) end in the same branch.
# The type is MULTI_CPU only if the program asks for a CPU. `accelerate launch --use_fsdp` doesn't say so to the program (together
# with --cpu it is refused), and on a machine without an accelerator Accelerator() then is of the type NO: each of the two processes
# takes itself for the only and main one, the model isn't wrapped, and gradients are not reduced. torch's FSDP2 itself works on
# CPUs: fully_shard of the same model leaves each process half.
#
# Seen (two processes, gloo, each with other data; the model has 8320 parameters):
#   plugin, cpu=True: MULTI_CPU of 2, FSDP2 False, plugin kept False, DistributedDataParallel, ranks hold [8320, 8320], gradients equal True
#   variables, cpu=True: MULTI_CPU of 2, FSDP2 False, plugin kept False, DistributedDataParallel, ranks hold [8320, 8320], gradients equal True
#   accelerate launch --use_fsdp: NO of 1, FSDP2 False, plugin kept False, Sequential, ranks hold [8320, 8320], gradients equal False
#   torch's fully_shard: ranks hold [4160, 4160], gradients equal True
#   lines about FSDP on stderr: 0
# Fails if a line changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 accelerate==1.15.0 numpy
cat >"$work/look.py" <<'PY'
import os
import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

how, rank = sys.argv[1], int(os.environ["RANK"])
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
said = ""
if how == "torch's fully_shard":
    distributed.init_process_group("gloo")
    fully_shard(model)
else:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2) if how.startswith("plugin") else None
    accelerator = Accelerator(cpu="cpu=True" in how, fsdp_plugin=plugin)
    model = accelerator.prepare(model)
    kept = getattr(accelerator.state, "fsdp_plugin", None) is not None
    kind = accelerator.distributed_type.value
    said = f"{kind} of {accelerator.num_processes}, FSDP2 {accelerator.is_fsdp2}, plugin kept {kept}, {type(model).__name__}, "
model(torch.full((4, 64), rank + 1.0)).sum().backward()
held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.parameters())
grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
found = [None, None]
distributed.all_gather_object(found, (held, sum(g.sum().item() for g in grads)))
if rank == 0:
    (a, first), (b, second) = found
    print(f"{how}: {said}ranks hold {[a, b]}, gradients equal {first == second}", flush=True)
distributed.destroy_process_group()
os._exit(0)  # now and then a thread of DDP's or gloo's is left, and a plain exit of the interpreter aborts
PY
cd "$work"
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' HF_HOME="$work"
two="$work/venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 look.py"
{
    $two "plugin, cpu=True"
    ACCELERATE_USE_FSDP=true FSDP_VERSION=2 $two "variables, cpu=True"
    "$work/venv/bin/accelerate" launch --use_fsdp --fsdp_version 2 --num_processes 2 --main_process_port 0 look.py \
        "accelerate launch --use_fsdp"
    $two "torch's fully_shard"
} 2>said | tee seen
echo "lines about FSDP on stderr: $(grep -ciE 'fsdp|shard' said || true)" | tee -a seen
diff seen - <<'SEEN'
plugin, cpu=True: MULTI_CPU of 2, FSDP2 False, plugin kept False, DistributedDataParallel, ranks hold [8320, 8320], gradients equal True
variables, cpu=True: MULTI_CPU of 2, FSDP2 False, plugin kept False, DistributedDataParallel, ranks hold [8320, 8320], gradients equal True
accelerate launch --use_fsdp: NO of 1, FSDP2 False, plugin kept False, Sequential, ranks hold [8320, 8320], gradients equal False
torch's fully_shard: ranks hold [4160, 4160], gradients equal True
lines about FSDP on stderr: 0
SEEN
