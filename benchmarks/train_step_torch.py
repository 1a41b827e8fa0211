"""The torch side of `benchmarks.train_step`: a worker that needs torch and numpy alone.

A GPT-2 as one writes it for speed: one product for query, key and value, PyTorch's fused causal
attention, fused AdamW, and `torch.compile` if asked.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import keep_to_cores, seconds_of, serve

LEARNING_RATE, BETAS, EPSILON, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:
    torch = None


class Side:
    """The model, its step, and its parts."""

    def prepare(self, folder: str, compiled: bool, cores: int, **shape: int) -> dict[str, Any]:
        """Loads what the lmjax side left in `folder`, and compiles."""
        threads = keep_to_cores(cores)
        if torch is None:
            raise ImportError("this Python has no torch")
        import numpy as np

        torch.set_num_threads(threads)
        self.shape = shape
        with np.load(Path(folder, "start.npz")) as start:
            start = {name: torch.from_numpy(start[name]) for name in start.files}
        rows = start.pop("rows").long()
        self.tokens, self.targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        self.model = GPT(**shape)
        self.model.load_state_dict(renamed(start, shape["layers"]))
        self.compile = torch.compile if compiled else lambda function: function
        self.run = self.compile(self.model)
        self.optimizer = optimizer(self.model)
        self.parts = {}
        # Compiles forward and backward without an update.
        self.run(self.tokens, self.targets).backward()
        self.optimizer.zero_grad()
        return {
            "version": f"torch {torch.__version__}",
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def steps(self, count: int) -> dict[str, list[float]]:
        """Seconds and losses of `count` steps."""
        losses = []

        def run():
            loss = self.run(self.tokens, self.targets)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())

        return {"seconds": seconds_of(run, count), "losses": losses}

    def part(self, name: str, count: int) -> dict[str, Any]:
        """Seconds of one kind of operation, forward and backward, and how many a step has."""
        if not self.parts:
            self.parts = self.make_parts()
        run, times = self.parts[name]
        run()
        return {"seconds": seconds_of(run, count), "times": times}

    def make_parts(self) -> dict[str, tuple[Callable[[], Any], int]]:
        """For each operation a function that runs it and its gradient, and its number a step."""
        model, block, shape = self.model, self.model.blocks[0], self.shape
        size = (shape["batch"], shape["length"], shape["hidden"])
        x, attended = torch.randn(size), torch.randn(size)
        qkv = torch.randn(*size[:2], 3 * size[2])

        def both(function, module, *inputs):
            inputs = [a.requires_grad_() for a in inputs]
            wanted = [*inputs, *(module.parameters() if module is not None else ())]
            function = self.compile(function)
            cotangents = [torch.ones_like(a) for a in _listed(function(*inputs))]
            return lambda: torch.autograd.grad(_listed(function(*inputs)), wanted, cotangents)

        projections = nn.ModuleList([block.qkv, block.output])
        tables = nn.ModuleList([model.embedding, model.positions])
        head = nn.ModuleList([model.embedding])
        return {
            "attention": (both(block.attend, None, qkv), shape["layers"]),
            "projections": (
                both(lambda x, y: (block.qkv(x), block.output(y)), projections, x, attended),
                shape["layers"],
            ),
            "feed_forward": (
                both(block.feed_forward, nn.ModuleList([block.up, block.down]), x),
                shape["layers"],
            ),
            "norm": (both(block.attention_norm, block.attention_norm, x), 2 * shape["layers"] + 1),
            "embedding": (both(lambda: model.embed(self.tokens), tables), 1),
            "head_and_loss": (both(lambda x: model.loss(x, self.targets), head, x), 1),
            "optimizer": (self.update(), 1),
        }

    def update(self) -> Callable[[], None]:
        """Clipping and the optimizer, on a copy of the model."""
        model = GPT(**self.shape)
        update = optimizer(model)

        def run():
            for parameter in model.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.full_like(parameter, 1e-3)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            update.step()

        return run


if torch is not None:

    class Block(nn.Module):
        """x + attention(norm(x)), then x + feed_forward(norm(x))."""

        def __init__(self, hidden: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.attention_norm = nn.LayerNorm(hidden)
            self.qkv = nn.Linear(hidden, 3 * hidden)
            self.output = nn.Linear(hidden, hidden)
            self.feed_forward_norm = nn.LayerNorm(hidden)
            self.up = nn.Linear(hidden, 4 * hidden)
            self.down = nn.Linear(4 * hidden, hidden)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.output(self.attend(self.qkv(self.attention_norm(x))))
            return x + self.feed_forward(self.feed_forward_norm(x))

        def attend(self, qkv: torch.Tensor) -> torch.Tensor:
            batch, length, width = qkv.shape
            query, key, value = (
                a.view(batch, length, self.heads, -1).transpose(1, 2)
                for a in qkv.split(width // 3, dim=2)
            )
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            return out.transpose(1, 2).reshape(batch, length, width // 3)

        def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(F.gelu(self.up(x), approximate="tanh"))

    class GPT(nn.Module):
        """GPT-2 with a tied head; gives the mean loss."""

        def __init__(self, layers, hidden, heads, length, vocabulary, batch) -> None:
            super().__init__()
            self.embedding = nn.Embedding(vocabulary, hidden)
            self.positions = nn.Embedding(length, hidden)
            self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
            self.final_norm = nn.LayerNorm(hidden)

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x)
            return self.loss(self.final_norm(x), targets)

        def embed(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))

        def loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = F.linear(hidden, self.embedding.weight)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def optimizer(model: Any) -> Any:
    """Fused AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)


def renamed(ours: dict[str, Any], layers: int) -> dict[str, Any]:
    """lmjax's parameters under torch's names, [outputs, inputs], one for each layer."""
    theirs = {
        "embedding.weight": ours["embedding.table"],
        "positions.weight": ours["positions.table"],
        "final_norm.weight": ours["final_norm.scale"],
        "final_norm.bias": ours["final_norm.bias"],
    }
    width = ours["embedding.table"].shape[1]
    for layer in range(layers):
        own = {name: a[layer] for name, a in ours.items() if name.startswith("blocks.")}
        to = f"blocks.{layer}"
        for norm in ("attention_norm", "feed_forward_norm"):
            theirs[f"{to}.{norm}.weight"] = own[f"blocks.{norm}.scale"]
            theirs[f"{to}.{norm}.bias"] = own[f"blocks.{norm}.bias"]
        three = [f"blocks.attention.{name}" for name in ("query", "key", "value")]
        theirs[f"{to}.qkv.weight"] = torch.cat(
            [own[f"{n}.weight"].reshape(width, -1).T for n in three]
        )
        theirs[f"{to}.qkv.bias"] = torch.cat([own[f"{n}.bias"].flatten() for n in three])
        theirs[f"{to}.output.weight"] = own["blocks.attention.output.weight"].reshape(-1, width).T
        theirs[f"{to}.output.bias"] = own["blocks.attention.output.bias"]
        for name in ("up", "down"):
            theirs[f"{to}.{name}.weight"] = own[f"blocks.feed_forward.{name}.weight"].T
            theirs[f"{to}.{name}.bias"] = own[f"blocks.feed_forward.{name}.bias"]
    return theirs


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, tuple) else [value]


if __name__ == "__main__":
    side = Side()
    serve({"prepare": side.prepare, "steps": side.steps, "part": side.part})
