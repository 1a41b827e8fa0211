"""A skill against size: six small models learn sums, and hard and smooth measures score them.

python -m experiments.skills
2 CPU cores, eight minutes, no download. Expect of sums of four digits 0, 0, 0.01, 0.41, 0.19 and
0.79 to be all right, the smallest model first, at 2.2, 1.9, 1.3, 0.5, 0.7 and 0.2 bits a token: a
jump and a steady gain, in the same answers (notebooks/emergence.ipynb explains it). One seed; the
fifth model is unlucky.
"""

from lmjax.data import Characters, Data, Domain, SumTexts
from lmjax.evaluation.tasks import Addition
from lmjax.jobs.chain import Chain
from lmjax.jobs.evaluate import Evaluate
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Checkpoints, Evaluation
from lmjax.launch import run
from lmjax.models import AttentionConfig, FeedForwardConfig, Normal, Rotary, TransformerConfig
from lmjax.training.optimizers import Muon
from lmjax.training.schedules import Cosine

WIDTHS = (8, 16, 24, 32, 48, 64)  # of the family's models
HELD_OUT = 0.1  # share of the sums that no model is trained on
DIGITS = 4  # most digits of a number


def model_of(width: int) -> TransformerConfig:
    """A GPT of two blocks with rotary positions."""
    return TransformerConfig(
        vocab_size=14,
        hidden=width,
        num_layers=2,
        max_length=64,
        positions=None,
        attention=AttentionConfig(num_heads=width // 8, head_dim=8, positions=Rotary()),
        feed_forward=FeedForwardConfig(size=4 * width),
        initializer=Normal(std=0.02, scale_residual=True),
        unroll=2,
    )


def train(width: int, steps: int, sums: int) -> Pretrain:
    """The training of one model; all of them read the same sums in the same order."""
    return Pretrain(
        output=f"{{output}}/width-{width}",
        steps=steps,
        model=model_of(width),
        data=Data(
            train=(Domain(name="sums", source=SumTexts(digits=DIGITS, number=sums)),),
            tokenizer=Characters(),
            held_out=HELD_OUT,
            length=64,
            batch_size=16,
            rows="whole_documents",
        ),
        optimizer=Muon(),
        schedule=Cosine(peak=1e-2, warmup=max(1, steps // 10), final=0.05),
        evaluation=Evaluation(every=steps, tokens=20_000),
        checkpoint=Checkpoints(every=steps, keep=1),
    )


def skills(widths: tuple[int, ...] = WIDTHS, steps: int = 1000, sums: int = 100_000) -> Chain:
    """The family's trainings, and then the scores of all of its models over their compute."""
    jobs = tuple(train(width, steps, sums) for width in widths)
    asked = tuple(
        Addition(title=f"{n} digits", digits=n, held_out=HELD_OUT) for n in range(2, DIGITS + 1)
    )
    folders = tuple(job.output for job in jobs)
    scores = Evaluate(output="{output}/scores", models=folders, tasks=asked, over_compute=True)
    return Chain(output="runs/skills", jobs=(*jobs, scores))


experiment = skills()

if __name__ == "__main__":
    run(experiment)
