"""Train a tiny transformer with ``backend="actcomp"`` and print what was saved for the backward: python examples/minimal.py"""

import torch
import torch.nn.functional as F
from torch import nn

import actpass


class Model(nn.Module):
    def __init__(self, vocabulary: int = 512, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.block(self.embed(tokens[:, :-1])))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


model = torch.compile(Model(), backend="actcomp")  # the only line that differs from a plain training script
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
tokens = torch.randint(512, (8, 129))
for _ in range(5):
    loss = model(tokens)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(actpass.report(model))
