#!/usr/bin/env bash
# torch 2.13.0 (2.15.0 alike), transformers 5.24.0, trl 1.16.0: TRL's fused head, which is to save the memory of the logits, takes a
# tile as wide as 32768 words whatever the vocabulary. With a small vocabulary a step needs many times the memory of whole logits.
#
# add_fused_lm_head, which TRL's trainers for SFT, DPO, KTO, GRPO and RLOO call, computes log-probabilities by tiles of 4096 tokens
# and _CHUNKED_LOGPROB_CHUNK_SIZE words. The buffer of a tile is made as min(tokens, 4096) x that constant, 32768, in the forward
# and again in the backward; a vocabulary that is smaller fills only its first columns. So below 32768 words (Llama 2 has 32000,
# models of bytes, proteins or time series have hundreds) the buffer is larger than the logits of its tokens: 134 MB instead of 1 MB
# for 1024 tokens of bytes in float32, 537 MB from 4096 tokens on. The loss is right. On a CPU the system maps only the pages
# that are written, so the process may stay smaller than what it asked for; a GPU's allocator hands out all of it. (With 8192
# words part of the peak is copies of the used columns, which the head makes only without Triton.)
#
# Seen (memory of one step of a one-layer Llama of width 64, against the model's own loss; pieces are allocations of over 100 MB.
# The peaks are 148 MB against 9 MB, 591 against 35, and 385 against 107):
#   256 words, 1024 tokens, logits of 1 MB: peak 17 times the own loss's, pieces in MB: [134, 134], of the own loss: []
#   256 words, 4096 tokens, logits of 4 MB: peak 17 times the own loss's, pieces in MB: [537, 537], of the own loss: []
#   8192 words, 1024 tokens, logits of 34 MB: peak 4 times the own loss's, pieces in MB: [134, 134], of the own loss: []
# Fails if a line changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 trl==1.16.0 numpy
cat >"$work/look.py" <<'PY'
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head


def step(words, tokens, **head):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, use_cache=False
    )
    model = LlamaForCausalLM(config)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # those of SFTTrainer
    batch = torch.randint(3, words, (tokens // 256, 257))  # 256 labels a row
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        loss = model(input_ids=batch, labels=batch, **head).loss
        loss.backward()
    events = sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    held = peak = 0
    pieces = []
    for nbytes in (e.nbytes() for e in events if e.name() == "[memory]"):
        held += nbytes
        peak = max(peak, held)
        pieces += [round(nbytes / 1e6)] * (nbytes > 100e6)
    return loss, peak, pieces


for words, tokens in ((256, 1024), (256, 4096), (8192, 1024)):
    own, whole, large = step(words, tokens)
    fused, tiled, pieces = step(words, tokens, fused_lm_head=True)
    torch.testing.assert_close(own, fused)
    logits = words * tokens * 4 / 1e6
    print(f"{words} words, {tokens} tokens, logits of {logits:.0f} MB: ", end="")
    print(f"peak {tiled / whole:.0f} times the own loss's, pieces in MB: {pieces}, of the own loss: {large}")
PY
cd "$work"
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$work/venv/bin/python" look.py 2>/dev/null | tee seen
diff seen - <<'SEEN'
256 words, 1024 tokens, logits of 1 MB: peak 17 times the own loss's, pieces in MB: [134, 134], of the own loss: []
256 words, 4096 tokens, logits of 4 MB: peak 17 times the own loss's, pieces in MB: [537, 537], of the own loss: []
8192 words, 1024 tokens, logits of 34 MB: peak 4 times the own loss's, pieces in MB: [134, 134], of the own loss: []
SEEN
