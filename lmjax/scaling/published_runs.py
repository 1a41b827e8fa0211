"""Published training runs: model, chips, layout, and the speed that was reported.

The numbers that are given here are from the papers and repositories that each entry names.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lmjax.config import replace
from lmjax.models import (
    TransformerConfig,
    bert,
    bloom,
    falcon,
    glm_130b,
    gpt3,
    llama,
    llama2,
    opt,
    palm,
)
from lmjax.scaling.clusters import find_cluster
from lmjax.scaling.division import Division
from lmjax.scaling.plan import StepPlan
from lmjax.scaling.published_models import (
    LLAMA_8B,
    maxtext_model,
    maxtext_v4_model,
    megatron_model,
    sized,
)
from lmjax.scaling.workload import Workload

LENGTH = 2048
TERA = 1e12


@dataclasses.dataclass(frozen=True)
class PublishedRun:
    """A run as it was published.

    Attributes:
      title: model and chips.
      model: its config.
      topology: of the chips.
      division: over them.
      source: of speed and layout.
      speed: tokens a second and chip; None: `tflops` tell.
      tflops: 10^12 FLOPs a second and chip, as the source counts.
      recomputed: whether the source counts what is computed again.
      layout: whether mesh, batch and recomputation are published.
      why: what explains a miss.
      length: tokens of a row.
      tokens: of the whole training.
      slices: of the topology.
    """

    title: str
    model: TransformerConfig
    topology: str
    division: Division
    source: str
    speed: float | None = None
    tflops: float | None = None
    recomputed: bool = False
    layout: bool = True
    why: str = ""
    length: int = LENGTH
    tokens: float = 0.0
    slices: int = 1

    @property
    def workload(self) -> Workload:
        """Model and batch."""
        model = replace(self.model, dtype="bfloat16", remat=self.division.remat)
        return Workload(model, self.length, self.division.batch, self.tokens)

    def plan(self) -> StepPlan:
        """The planner's plan of it."""
        return StepPlan(self.workload, self.division, find_cluster(self.topology, self.slices))

    @property
    def published(self) -> float:
        """Tokens a second and chip."""
        if self.speed is not None:
            return self.speed
        parts = self.workload.forward_parts
        square = 1 if not self.model.attention.causal else 2
        blocks = parts["products"] + square * parts["attention"]
        passes = 4 if self.recomputed else 3
        return self.tflops * TERA / (passes * blocks + 3 * parts["head"])


MEGATRON = "Narayanan et al. 2021, arXiv:2104.04473, table 1"
MAXTEXT = "MaxText's README and src/maxtext/configs/tpu"


def megatron_run(
    title: str, sizes: tuple[int, int, int], mesh: dict[str, int], tflops: float, **more: Any
) -> PublishedRun:
    """A row of Megatron's table: hidden, layers, heads; tensor, stage, data and microbatches.

    Rows of a microbatch and chunks of the interleaved schedule are not published: one row, or four
    without a pipeline, and two chunks are assumed.
    """
    chunks = {"schedule": "interleaved", "chunks": 2} if mesh.get("stage", 1) > 1 else {}
    division = Division(**mesh, **chunks, remat="full", zero=1, sums_once=True, parts_again=False)
    gpus = division.chips
    settings = dict(source=MEGATRON, tflops=tflops, recomputed=True) | more
    return PublishedRun(
        f"Megatron {title}, {gpus:,} A100 (TP{division.tensor} PP{division.stage}"
        f" DP{division.data})",
        megatron_model(*sizes),
        f"a100-80gb:{gpus}",
        division,
        **settings,
    )


def gpt3_run() -> PublishedRun:
    """GPT-3 on 1,024 A100, batch 1,536: 140 TFLOP/s, 34 days for 300 B tokens."""
    return dataclasses.replace(
        megatron_run(
            "175B",
            (12_288, 96, 96),
            dict(tensor=8, stage=8, data=16, microbatches=96),
            140.0,
            source="Narayanan et al. 2021, section 5.1",
            why="chunks of the interleaved schedule are not published: 2 are assumed",
        ),
        tokens=300e9,
    )


def llama_run() -> PublishedRun:
    """LLaMA-65B on 2,048 A100 80 GB: 380 tokens/s/GPU, about 21 days."""
    return PublishedRun(
        "LLaMA-65B, 2,048 A100",
        llama("65B"),
        "a100-80gb:2048",
        Division(fsdp=256, tensor=8, rows=4, microbatches=2, remat="dots"),
        "Touvron et al. 2023, arXiv:2302.13971, section 2.4",
        speed=380.0,
        layout=False,
        why="layout not published: fsdp=256 tensor=8 and products kept are assumed",
        tokens=1.4e12,
    )


def llama_7b_run() -> PublishedRun:
    """LLaMA-7B on 64 A100 80 GB, 20 tokens a parameter."""
    return PublishedRun(
        "LLaMA-7B, 64 A100",
        llama("7B"),
        "a100-80gb:64",
        Division(fsdp=64, rows=4, microbatches=4, remat="dots"),
        "",
        tokens=135e9,
    )


def bert_run(length: int, rows: int) -> PublishedRun:
    """BERT-large on 64 TPU chips, for rows of a length."""
    return PublishedRun(
        "BERT-large, 64 TPU chips",
        bert("large"),
        "v3:8x8",
        Division(fsdp=64, rows=rows // 64, remat="none"),
        "Devlin et al. 2018, arXiv:1810.04805, appendix A.2",
        length=length,
        tokens=1.0,
    )


RUNS = (
    PublishedRun(
        "PaLM 540B, 2 x 3,072 TPU v4",
        palm("540B"),
        "v4:12x16x16",
        Division(data=2, fsdp=256, tensor=12, rows=4, remat="full"),
        "Chowdhery et al. 2022, arXiv:2204.02311, section 4: 238.3 k tokens/s",
        speed=238_300 / 6144,
        slices=2,
        why="most likely XLA hid less of the sums over 12 chips in 2022 than one half",
    ),
    PublishedRun(
        "MaxText 22B, 64 TPU v4",
        maxtext_v4_model(6144, 48, 24),
        "v4:4x4x4",
        Division(fsdp=64, rows=13, remat="full"),
        MAXTEXT,
        tflops=156.0,
    ),
    PublishedRun(
        "MaxText 52B, 192 TPU v4",
        maxtext_v4_model(12_288, 32, 32),
        "v4:4x4x12",
        Division(fsdp=192, rows=7, remat="full"),
        MAXTEXT,
        tflops=154.0,
    ),
    PublishedRun(
        "MaxText 16B, 256 TPU v5e",
        maxtext_model(16),
        "v5e:16x16",
        Division(fsdp=256, rows=6, remat="full"),
        MAXTEXT,
        tflops=120.0,
    ),
    PublishedRun(
        "MaxText 32B, 256 TPU v5e",
        maxtext_model(32),
        "v5e:16x16",
        Division(fsdp=256, rows=4, remat="full"),
        MAXTEXT,
        tflops=132.0,
    ),
    PublishedRun(
        "MaxText 128B, 256 TPU v5e",
        maxtext_model(128),
        "v5e:16x16",
        Division(fsdp=16, tensor=16, rows=16, remat="full"),
        MAXTEXT,
        tflops=110.0,
    ),
    PublishedRun(
        "MaxText 32B, 64 TPU v5p",
        maxtext_model(32),
        "v5p:4x4x4",
        Division(fsdp=16, tensor=4, rows=24, remat="dots"),
        MAXTEXT,
        tflops=328.0,
    ),
    PublishedRun(
        "MaxText 64B, 64 TPU v5p",
        maxtext_model(64),
        "v5p:4x4x4",
        Division(fsdp=16, tensor=4, rows=12, remat="dots"),
        MAXTEXT,
        tflops=323.0,
        why="one number for v5p stands for 86 percent of the peak with remat=full, 72 with dots",
    ),
    PublishedRun(
        "MaxText 128B, 128 TPU v5p",
        maxtext_model(128),
        "v5p:4x4x8",
        Division(fsdp=16, tensor=8, rows=8, remat="dots"),
        MAXTEXT,
        tflops=315.0,
        why="one number for v5p stands for 86 percent of the peak with remat=full, 72 with dots",
    ),
    PublishedRun(
        "MaxText 1024B, 2,048 TPU v5p",
        maxtext_model(1024),
        "v5p:8x16x16",
        Division(fsdp=128, tensor=16, rows=32, remat="full"),
        MAXTEXT,
        tflops=297.0,
        why="one number for v5p stands for 86 percent of the peak with remat=full, 72 with dots",
    ),
    PublishedRun(
        "MaxText LLaMA-2 70B, 512 TPU v5p",
        llama2("70B"),
        "v5p:8x8x8",
        Division(fsdp=512, rows=2, remat="full"),
        "MaxText's docs/reference/models/tiering.md, src/maxtext/configs/tpu/v5p/llama2_70b.sh",
        speed=692.0,
        length=4096,
        layout=False,
        why="its policy keeps all products but gate and up, a little more than remat=full does",
    ),
    PublishedRun(
        "MaxText LLaMA-3.1 70B, 256 TPU v6e",
        replace(llama2("70B"), vocab_size=128_256, max_length=8192),
        "v6e:16x16",
        Division(fsdp=256, rows=1, remat="full"),
        "MaxText's docs/reference/models/tiering.md",
        speed=960.0,
        length=8192,
        layout=False,
        why="layout not published: fsdp=256 and full recomputation are assumed",
    ),
    megatron_run("18.4B", (6144, 40, 48), dict(tensor=8, data=32, rows=4, microbatches=8), 135.0),
    megatron_run("39.1B", (8192, 48, 64), dict(tensor=8, stage=2, data=32, microbatches=48), 138.0),
    megatron_run(
        "145.6B", (12_288, 80, 96), dict(tensor=8, stage=8, data=24, microbatches=96), 148.0
    ),
    megatron_run(
        "529.6B", (20_480, 105, 128), dict(tensor=8, stage=35, data=9, microbatches=280), 163.0
    ),
    megatron_run(
        "1008B", (25_600, 128, 160), dict(tensor=8, stage=64, data=6, microbatches=512), 163.0
    ),
    gpt3_run(),
    PublishedRun(
        "OPT-175B, 992 A100",
        opt("175B"),
        "a100-80gb:992",
        Division(fsdp=124, tensor=8, rows=8, remat="full"),
        "Zhang et al. 2022, arXiv:2205.01068: up to 147 TFLOP/s",
        tflops=147.0,
        recomputed=True,
        why="weights of each layer are gathered over the network, and not all of it is hidden",
    ),
    PublishedRun(
        "BLOOM-176B, 384 A100 (TP4 PP12 DP8)",
        bloom("176B"),
        "a100-80gb:384",
        Division(
            data=8,
            stage=12,
            tensor=4,
            rows=2,
            microbatches=128,
            remat="full",
            sums_once=True,
            parts_again=False,
        ),
        "Le Scao et al. 2022, arXiv:2211.05100: 150 TFLOP/s, 1F1B, microbatches of 2",
        tflops=150.0,
        recomputed=True,
    ),
    PublishedRun(
        "GLM-130B, 768 A100 40 GB (TP4 PP8 DP24)",
        glm_130b(),
        "a100-40gb:768",
        Division(data=24, stage=8, tensor=4, microbatches=176, remat="full", parts_again=False),
        "Zeng et al. 2022, arXiv:2210.02414, and its log: 88.5 s for 4,224 rows",
        speed=4224 * LENGTH / 88.5 / 768,
        why="most likely its rotary positions, GeGLU and DeepNorm, which no fused kernels"
        " serve, leave the tensor cores waiting",
    ),
    llama_run(),
    PublishedRun(
        "Falcon-40B, 384 A100 40 GB (TP8 PP4 DP12)",
        falcon("40B"),
        "a100-40gb:384",
        Division(data=12, stage=4, tensor=8, microbatches=96, remat="full", parts_again=False),
        "the model card: 1,000 B tokens in two months",
        speed=1e12 / (61 * 86_400) / 384,
        why="two months is a round number, and recomputation is not published: full is assumed",
    ),
    PublishedRun(
        "Megatron 177B, 2,304 H100 (TP8 PP6 DP48)",
        sized(gpt3("125M"), hidden=12_288, layers=96, heads=96, vocab=131_072),
        "h100:2304",
        Division(
            data=48,
            stage=6,
            tensor=8,
            microbatches=24,
            schedule="interleaved",
            chunks=4,
            remat="none",
            parts_again=False,
        ),
        "Megatron-LM's images/model_table.png",
        tflops=432.8,
        length=4096,
    ),
    PublishedRun(
        "MaxText LLaMA-2 7B, 8 H100",
        llama2("7B"),
        "h100:8",
        Division(fsdp=8, rows=4, remat="dots"),
        "MaxText's src/maxtext/configs/gpu/a3/llama_2_7b/README.md",
        tflops=492.0,
        length=4096,
    ),
    PublishedRun(
        "KempnerForge 8.0B, 1 H200",
        LLAMA_8B,
        "h200:1",
        Division(rows=1, remat="full"),
        "KempnerForge's docs/reference/benchmarks.md: LLaMA-3's sizes are taken",
        speed=10_471.0,
        length=4096,
    ),
)
