"""Bytes on disk and perplexity of a trained model in 8 and 4 bits, in each way to round it.

python -m benchmarks.compression folder=DATA [model=FOLDER] [json=FILE]

`folder` holds wikitext2 (valid.txt, test.txt) and gutenberg (novels, *.txt.gz). A small LLaMA is
trained on valid.txt and the novels (some minutes on 2 CPU cores), or taken from `model`. Bytes are
those of all files of a folder, settings and tokenizer too, beside the folder of transformers' with
16 bits a weight. The perplexity is that of test.txt; methods that calibrate read valid.txt.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.harness import save, table
from lmjax.compression.forms_table import FormsTable
from lmjax.compression.quantise import Quantise
from lmjax.config import UserError, config
from lmjax.data import Data, Domain, TextFiles, TrainedBPE
from lmjax.interop.convert import convert
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Checkpoints, Evaluation
from lmjax.launch import exit_on_user_error, from_command_line
from lmjax.models import (
    AttentionConfig,
    GatedFeedForwardConfig,
    Normal,
    RMSNormConfig,
    Rotary,
    TransformerConfig,
)
from lmjax.parallel import Mesh
from lmjax.training.optimizers import Muon
from lmjax.training.schedules import Cosine

HEAD = 64  # width of a head
# Settings of `quantise` by the name of a form; tables are in int8 where nothing else is said.
FORMS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "int4, nearest": {"weights": "int4"},
    "int4, GPTQ": {"weights": "int4", "method": "gptq"},
    "int4, GPTQ, tables too": {"weights": "int4", "method": "gptq", "tables": "int4"},
    "int4, AWQ": {"weights": "int4", "method": "awq"},
    "NF4": {"weights": "nf4"},
}
# At most this share of the bytes, and this rise of the perplexity in percent.
BARS = {"int8": (0.55, 0.5), "int4, GPTQ": (0.35, 3.0)}


@config
class CompressionBenchmark:
    """A small LLaMA, or a model of the user's."""

    folder: str = ""  # of the texts
    model: str = ""  # run or model folder that is made small; empty: one is trained
    output: str = "runs/compression"  # run folder of the training; a finished one is taken as it is
    layers: int = 6  # blocks of the trained model
    hidden: int = 256  # its width, of which heads have 64 each
    vocabulary: int = 4096  # its tokens
    steps: int = 500  # of training, on 8 rows of 256 tokens
    letters: int = 100_000  # of test.txt that are scored
    rows: int = 64  # of valid.txt, of 256 tokens, that are calibrated on
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for numbers that measure nothing."""
        for name in ("layers", "steps", "letters", "rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1")
        if self.hidden % HEAD or self.hidden < HEAD:
            raise UserError(f"hidden={self.hidden}: must be a multiple of {HEAD}")

    def text(self, name: str) -> str:
        """Path of a file of wikitext."""
        path = Path(self.folder) / "wikitext2" / name
        if not path.is_file():
            raise UserError(f"folder={self.folder!r} has no wikitext2/{name}")
        return str(path)


def training(settings: CompressionBenchmark) -> Pretrain:
    """The training run."""
    hidden = settings.hidden
    model = TransformerConfig(
        vocab_size=settings.vocabulary,
        hidden=hidden,
        num_layers=settings.layers,
        max_length=256,
        attention=AttentionConfig(
            num_heads=hidden // HEAD,
            head_dim=HEAD,
            bias=False,
            output_bias=False,
            positions=Rotary(),
        ),
        feed_forward=GatedFeedForwardConfig(size=8 * hidden // 3 // 64 * 64),
        norm=RMSNormConfig(),
        positions=None,
        initializer=Normal(std=0.02, scale_residual=True),
        unroll=settings.layers,
    )
    # Old editions of two of them are there too.
    path = str(Path(settings.folder) / "gutenberg" / "[0-9]*[0-9]-[!o]*.txt.gz")
    novels = Domain(
        name="novels",
        source=TextFiles(path=path, on_error="replace", span=(0.0, 0.98)),
        evaluation=TextFiles(path=path, on_error="replace", span=(0.98, 1.0)),
    )
    wikitext = Domain(
        name="wikitext",
        source=TextFiles(path=settings.text("valid.txt")),
        evaluation=TextFiles(path=settings.text("test.txt")),
    )
    return Pretrain(
        output=settings.output,
        steps=settings.steps,
        model=model,
        data=Data(
            train=(wikitext, novels),
            tokenizer=TrainedBPE(vocab_size=settings.vocabulary, sample_bytes=4_000_000),
            length=256,
            batch_size=8,
        ),
        optimizer=Muon(),
        schedule=Cosine(peak=1e-2, warmup=50, final=0.05),
        evaluation=Evaluation(every=settings.steps, tokens=20_000),
        checkpoint=Checkpoints(every=settings.steps),
    )


def made(
    settings: CompressionBenchmark, source: str, folder: Path
) -> dict[str, tuple[Path, float]]:
    """Folder of each form of a model, and the seconds that it took; the first is the whole one."""
    texts = {"calibration": settings.text("valid.txt"), "rows": settings.rows}
    begin = time.perf_counter()
    with jax.set_mesh(Mesh().build()):
        convert(source, folder / "whole", to_run=False, dtype="bfloat16")
    found = {"bfloat16": (folder / "whole", time.perf_counter() - begin)}
    for number, (name, how) in enumerate(FORMS.items()):
        own, begin = folder / str(number), time.perf_counter()
        Quantise(source=source, destination=str(own), **texts, **how).run()
        found[name] = own, time.perf_counter() - begin
    return found


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Trains, rounds, measures and prints."""
    settings = from_command_line(CompressionBenchmark())
    measure = FormsTable(text=settings.text("test.txt"), tokens=0).measure
    text = Path(settings.text("test.txt")).read_text("utf-8")[: settings.letters]
    if not settings.model:
        training(settings).run()
    source, forms = settings.model or settings.output, {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = made(settings, source, Path(temporary))
        with jax.set_mesh(Mesh().build()):
            exact = measure(source, text, [])
            for name, (folder, seconds) in folders.items():
                one = measure(str(folder), text, [])
                forms[name] = {"bytes": size_of(folder), "perplexity": one.perplexity}
                forms[name] |= {"tokens": one.tokens, "seconds": seconds}
    rows = [["as trained", "", "", exact.perplexity, "", ""]]
    for name, one in forms.items():
        one["share"] = one["bytes"] / forms["bfloat16"]["bytes"]
        one["rise"] = 100 * (one["perplexity"] / exact.perplexity - 1)
        numbers = one["bytes"] / 1e6, one["share"], one["perplexity"], one["rise"], one["seconds"]
        rows.append([name, *numbers])
    print(table(["form", "MB", "share", "perplexity", "rise, percent", "seconds"], rows))
    held = {
        name: forms[name]["share"] <= share and forms[name]["rise"] <= rise
        for name, (share, rise) in BARS.items()
    }
    for name, (share, rise) in BARS.items():
        words = "holds" if held[name] else "does not hold"
        print(f"{name}: at most {share:g} of the bytes, {rise:g} percent: {words}")
    save(settings.json, "compression", perplexity=exact.perplexity, forms=forms, held=held)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
