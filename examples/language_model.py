"""Distillation of a language model: logits (B, L, C), and padding that no loss may see.

    python examples/language_model.py

The text is a chain in which each of 40 tokens is followed by one of three, so a perfect model has perplexity 3.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_core import DKDLoss, backward_streams, deepkd_sgd, flatten_rows, to_streams

VOCABULARY, LENGTH, PADDING = 40, 24, -100
SUCCESSORS = torch.randint(VOCABULARY, (VOCABULARY, 3), generator=torch.Generator().manual_seed(0))


class LanguageModel(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        self.rnn = nn.GRU(width, width, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


def batch(size: int = 32) -> tuple[Tensor, Tensor]:
    """Tokens (B, L) and their successors (B, L), padded behind a length of their own."""
    text = torch.randint(VOCABULARY, (size, 1))
    for _ in range(LENGTH):
        text = torch.cat([text, SUCCESSORS[text[:, -1:], torch.randint(3, (size, 1))]], dim=1)
    is_padding = torch.arange(LENGTH) >= torch.randint(LENGTH // 2, LENGTH + 1, (size, 1))
    return text[:, :-1], text[:, 1:].masked_fill(is_padding, PADDING)


def task_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PADDING)


@torch.no_grad()
def perplexity(model: nn.Module) -> float:
    tokens, target = batch(256)
    return float(task_loss(model(tokens), target).exp())


def main() -> None:
    torch.manual_seed(0)
    teacher, student = LanguageModel(width=64), LanguageModel(width=16)
    adam = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for _ in range(150):  # your own recipe loads a checkpoint here
        tokens, target = batch()
        adam.zero_grad()
        task_loss(teacher(tokens), target).backward()
        adam.step()
    print(f"perplexity before: student {perplexity(student):.1f}, teacher {perplexity(teacher):.1f}")
    loss = DKDLoss(alpha=1.0, beta=2.0, temperature=1.0)  # chunk_rows=512 saves memory with 100,000 tokens
    optimizer = deepkd_sgd(student.parameters(), lr=0.5, step="matched")
    for _ in range(300):
        tokens, target = batch()
        logits = student(tokens)
        with torch.no_grad():
            teacher_logits = teacher(tokens)
        rows = flatten_rows(logits, teacher_logits, target, ignore_index=PADDING)  # (N, C), (N, C), (N,)
        backward_streams(to_streams(loss(*rows), loss, task_loss(logits, target)), optimizer)
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"perplexity after: student {perplexity(student):.1f}")


if __name__ == "__main__":
    main()
