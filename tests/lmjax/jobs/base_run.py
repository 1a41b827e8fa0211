"""A pretrained run that the tests of other jobs begin with."""

from lmjax.data import Bytes, Data, Domain, TextFiles
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Evaluation
from lmjax.training.schedules import Constant


def pretrain_base(folder, model, split="file", held_out=0.0):
    """Trains `model` for one step on bytes of `folder`/corpus.txt, which is made; in base/."""
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"line {n} and {n * n}\n" for n in range(300)))
    Pretrain(
        output=str(folder / "base"),
        steps=1,
        model=model,
        data=Data(
            train=(Domain(name="lines", source=TextFiles(path=str(corpus), split=split)),),
            tokenizer=Bytes(),
            held_out=held_out,
            length=min(32, model.max_length),
            batch_size=8,
            cache=str(folder / "cache"),
        ),
        schedule=Constant(peak=1e-2, warmup=0),
        evaluation=Evaluation(prompts=()),
    ).run()
