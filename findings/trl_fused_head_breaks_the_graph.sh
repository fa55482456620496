#!/usr/bin/env bash
# torch 2.13.0 (2.15.0 alike), transformers 5.24.0, trl 1.16.0: TRL's fused head, which its trainers train with, breaks the graph
# of a compiled model: its product and its whole backward run as plain Python. The model's own loss is one graph.
#
# The head is an autograd function that writes its product into a slice of a buffer of 32768 columns, with torch.mm(..., out=tile).
# Where the vocabulary is smaller, or no multiple of 32768, the slice isn't contiguous, and Dynamo doesn't trace such an out=. What
# is compiled is the backbone, the folding of one tile, and the loss from its sums. With 32768 words the slice is contiguous, yet
# there is a second cause: the trainers ask for some of the head's five outputs, the others are None, and Dynamo, where it
# traces the backward, calls .contiguous() on the gradient of each output, also of a None. It then drops the frame, counts no break,
# and compiles the backbone and the head's forward apart. With all five outputs that model is one graph, as with its own loss.
#
# Seen (graphs that are compiled for one training step of a two-layer Llama on a CPU; "SFT" are the outputs that SFTTrainer asks for):
#   own loss, 256 words: 1, breaks: none
#   fused head, 256 words, SFT: 3, breaks: Attempted to call op with non-contiguous `out=` tensor
#   fused head, 256 words, all outputs: 3, breaks: Attempted to call op with non-contiguous `out=` tensor
#   fused head, 32768 words, SFT: 2, breaks: none
#   fused head, 32768 words, all outputs: 1, breaks: none
# Fails if a line changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 trl==1.16.0 numpy
cat >"$work/look.py" <<'PY'
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

SFT = ("log_probs", "entropy", "is_top1")
ALL = (*SFT, "log_sum_sq_probs", "mean_logits")
TOKENS = torch.randint(3, 64, (2, 17), generator=torch.Generator().manual_seed(0))


def look(name, words, outputs=SFT, **head):
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    model = LlamaForCausalLM(config)
    add_fused_lm_head(model, outputs=outputs)
    graphs = []

    def backend(gm, _):
        graphs.append(gm)
        return gm

    loss = torch.compile(model, backend=backend)(input_ids=TOKENS, labels=TOKENS, **head).loss
    loss.backward()
    torch.testing.assert_close(loss, model(input_ids=TOKENS, labels=TOKENS).loss)
    breaks = sorted(reason.splitlines()[0].strip() for reason in counters["graph_break"])
    print(f"{name}: {len(graphs)}, breaks: {', '.join(breaks) or 'none'}")


look("own loss, 256 words", 256)
for words in (256, 32768):
    look(f"fused head, {words} words, SFT", words, fused_lm_head=True)
    look(f"fused head, {words} words, all outputs", words, ALL, fused_lm_head=True)
PY
cd "$work"
OMP_NUM_THREADS=1 "$work/venv/bin/python" look.py 2>/dev/null | tee seen
diff seen - <<'SEEN'
own loss, 256 words: 1, breaks: none
fused head, 256 words, SFT: 3, breaks: Attempted to call op with non-contiguous `out=` tensor
fused head, 256 words, all outputs: 3, breaks: Attempted to call op with non-contiguous `out=` tensor
fused head, 32768 words, SFT: 2, breaks: none
fused head, 32768 words, all outputs: 1, breaks: none
SEEN
