"""Training recipes of papers, by size of the model: all settings that name no machine.

    experiment = gpt3_recipe("1.3B").experiment(output="runs/mine", data=..., mesh=Mesh(fsdp=8))

The numbers are the papers'; what a paper leaves open stands in the docstring with what is chosen
instead. Where it says nothing, AdamW has GPT-3's settings, gradients are clipped to 1.0 and
documents of a row do not see each other. All compute in bfloat16, whatever the authors had. GPT-1
(its length is 100 epochs of a corpus), GPT-2, Baichuan 1, ChatGLM and Falcon-7B have no recipe:
their batches, rates or lengths are not published or not known here.
"""

from lmjax.config import preset, replace
from lmjax.jobs.recipe import ADAMW, Recipe, doublings, grow, steps_for
from lmjax.models import (
    TransformerConfig,
    baichuan2,
    bert,
    bloom,
    falcon,
    glm,
    glm_130b,
    gpt3,
    llama,
    llama2,
    opt,
    palm,
    qwen,
    skywork,
    t5,
)
from lmjax.models.gpt import size_of
from lmjax.objectives import CausalLM, MaskedLM, SpanCorruption
from lmjax.objectives.glm import glm_130b_objective, glm_objective
from lmjax.training.optimizers import Adafactor, AdamW
from lmjax.training.schedules import Cosine, InverseSquareRoot, Linear

# rows of a batch, peak rate, tokens over which the batch grows
GPT3 = {
    "125M": (256, 6.0e-4, 4e9),
    "350M": (256, 3.0e-4, 4e9),
    "760M": (256, 2.5e-4, 4e9),
    "1.3B": (512, 2.0e-4, 8e9),
    "2.7B": (512, 1.6e-4, 8e9),
    "6.7B": (1024, 1.2e-4, 8e9),
    "13B": (1024, 1.0e-4, 8e9),
    "175B": (1536, 0.6e-4, 12e9),
}


@preset
def gpt3_recipe(size: str = "125M") -> Recipe:
    """GPT-3 (Brown et al. 2020, table 2.1 and appendix B): 300 B tokens; rates go by tokens.

    Warm-up over 375 M, a cosine to a tenth over 260 B, then flat. The batch grows from 32 k tokens
    over the first 4 to 12 B, "depending on the model size": which is whose is not published, nor
    are the sizes between; 4, 8 and 12 B and doublings are chosen. 3.2 M tokens are no whole number
    of rows: 1,536 are chosen, 3.15 M.
    """
    rows, peak, over = size_of(GPT3, size, "gpt3_recipe")
    table = grow(doublings(16, rows), over / 2048)
    return Recipe(
        model=gpt3(size),
        length=2048,
        batch_size=16,
        ramp=table[1:],
        steps=steps_for(300e9, 2048, table),
        schedule=Cosine(
            peak=peak,
            warmup=round(375e6 / 2048 / rows),
            final=0.1,
            end=round(260e9 / 2048 / rows),
        ),
        schedule_counts="full batches",
        objective=CausalLM(cross_documents=True),
    )


# rows of a batch, peak rate
OPT = {
    "125M": (256, 6.0e-4),
    "350M": (256, 3.0e-4),
    "1.3B": (512, 2.0e-4),
    "2.7B": (512, 1.6e-4),
    "6.7B": (1024, 1.2e-4),
    "13B": (2048, 1.0e-4),
    "30B": (2048, 1.0e-4),
    "66B": (1024, 0.8e-4),
    "175B": (1024, 1.2e-4),
}


@preset
def opt_recipe(size: str = "125M") -> Recipe:
    """OPT (Zhang et al. 2022, table 1 and metaseq's launcher): 300 B tokens, a line to a tenth.

    Warm-up is 375 M tokens, 2,000 steps for 175B. Of 175B the launcher says 3e-5 and the logbook
    has rates and clipping changed by hand during the run: the paper's 1.2e-4 and 1.0 stand here.
    Its embeddings had no dropout; ours have the 0.1 of all else.
    """
    rows, peak = size_of(OPT, size, "opt_recipe")
    warmup = 2000 if size == "175B" else round(375e6 / 2048 / rows)
    return Recipe(
        model=opt(size),
        length=2048,
        batch_size=rows,
        steps=steps_for(300e9, 2048, ((0, rows),)),
        schedule=Linear(peak=peak, warmup=warmup, final=0.1),
    )


# rows of a batch, peak rate, last rate
BLOOM = {
    "560M": (256, 3.0e-4, 1e-5),
    "1.1B": (256, 2.5e-4, 1e-5),
    "1.7B": (512, 2.0e-4, 1e-5),
    "3B": (512, 1.6e-4, 1e-5),
    "7.1B": (512, 1.2e-4, 1e-5),
    "176B": (2048, 6e-5, 6e-6),
}


@preset
def bloom_recipe(size: str = "560M") -> Recipe:
    """BLOOM (Le Scao et al. 2022; BigScience's launch scripts of tr11): rates go by samples.

    Warm-up over 183,105 rows, a cosine over 200 M (410 B tokens), then flat up to 220 M (450 B),
    as the scripts ask; the runs were ended before, 176B's after 366 B tokens. The batch grows from
    192 by 16 at a time, over 9,765,625 rows.
    """
    rows, peak, last = size_of(BLOOM, size, "bloom_recipe")
    table = grow(range(192, rows + 1, 16), 9_765_625)
    return Recipe(
        model=bloom(size),
        length=2048,
        batch_size=192,
        ramp=table[1:],
        steps=steps_for(220e6 * 2048, 2048, table),
        schedule=Cosine(
            peak=peak,
            warmup=round(183_105 / rows),
            final=last / peak,
            end=round(200e6 / rows),
        ),
        schedule_counts="full batches",
        objective=CausalLM(cross_documents=True),
    )


# peak rate, tokens
LLAMA = {
    "7B": (3.0e-4, 1.0e12),
    "13B": (3.0e-4, 1.0e12),
    "33B": (1.5e-4, 1.4e12),
    "65B": (1.5e-4, 1.4e12),
}
LLAMA2 = {"7B": (3.0e-4, 2.0e12), "13B": (3.0e-4, 2.0e12), "70B": (1.5e-4, 2.0e12)}


def four_million(model: TransformerConfig, length: int, peak: float, tokens: float) -> Recipe:
    """LLaMA's way: batches of 4 M tokens, 2,000 steps of warm-up, a cosine to a tenth."""
    rows = 2**22 // length
    return Recipe(
        model=model,
        length=length,
        batch_size=rows,
        steps=steps_for(tokens, length, ((0, rows),)),
        schedule=Cosine(peak=peak, warmup=2000, final=0.1),
    )


@preset
def llama_recipe(size: str = "7B") -> Recipe:
    """LLaMA (Touvron et al. 2023a, table 2): 7B and 13B on 1.0 T tokens, 33B and 65B on 1.4 T.

    AdamW's epsilon is not published; 1e-8 is chosen.
    """
    return four_million(llama(size), 2048, *size_of(LLAMA, size, "llama_recipe"))


@preset
def llama2_recipe(size: str = "7B") -> Recipe:
    """LLaMA 2 (Touvron et al. 2023b, section 2.2): 2.0 T tokens; AdamW with epsilon 1e-5."""
    recipe = four_million(llama2(size), 4096, *size_of(LLAMA2, size, "llama2_recipe"))
    return replace(recipe, optimizer=replace(ADAMW, epsilon=1e-5))


@preset
def baichuan2_recipe(size: str = "7B") -> Recipe:
    """Baichuan 2 (Yang et al. 2023): 2.6 T tokens, clipping to 0.5, max-z loss of 2e-4.

    The batch and the last rate are not published; LLaMA 2's 4 M tokens and a tenth are chosen.
    """
    peak = size_of({"7B": 2.0e-4, "13B": 1.5e-4}, size, "baichuan2_recipe")
    return replace(
        four_million(baichuan2(size), 4096, peak, 2.6e12),
        gradient_clip=0.5,
        objective=CausalLM(max_z_loss=2e-4),
    )


# peak rate, tokens, length
QWEN = {
    "1.8B": (3.0e-4, 2.2e12, 2048),
    "7B": (3.0e-4, 2.4e12, 2048),
    "14B": (3.0e-4, 3.0e12, 2048),
    "72B": (1.5e-4, 3.0e12, 8192),
}


@preset
def qwen_recipe(size: str = "7B") -> Recipe:
    """Qwen (Bai et al. 2023, table 1 and section 2.4): batches of 4 M tokens, a cosine to a tenth.

    Warm-up, decay and clipping of pretraining are not published: 2,000 steps, 0.1 and 1.0 are
    chosen. Of 72B only the 3.0 T tokens are: LLaMA 2 70B's rate and the batch of the smaller sizes
    are chosen, and the 8,192 tokens a row of its released seq_length. The longer rows that end the
    training of 1.8B and 7B are left out: their share is not published.
    """
    peak, tokens, length = size_of(QWEN, size, "qwen_recipe")
    return four_million(qwen(size), length, peak, tokens)


@preset
def skywork_recipe(size: str = "13B") -> Recipe:
    """Skywork-13B (Wei et al. 2023, section 3.6): 3.13 T tokens in batches of 16 M.

    A cosine from 6e-4 to 6e-5 over 2 T tokens; the 6e-5 stays for another 1 T, and for the 130 B of
    the second stage, whose text the experiment sets. Warm-up is not published; 2,000 steps are
    chosen.
    """
    rows = 4096
    return Recipe(
        model=skywork(size),
        length=4096,
        batch_size=rows,
        steps=steps_for(3.13e12, 4096, ((0, rows),)),
        schedule=Cosine(peak=6e-4, warmup=2000, final=0.1, end=round(2e12 / 4096 / rows)),
    )


@preset
def falcon_recipe(size: str = "40B") -> Recipe:
    """Falcon-40B (its model card): 1.0 T tokens; rates go by tokens; z-loss of 1e-4.

    Warm-up over 4 B tokens, a cosine from 1.85e-4 to a tenth; the batch grows over 100 B tokens.
    From where is not published, nor are AdamW's betas: doublings from 72 rows and GPT-3's betas are
    chosen.
    """
    size_of({"40B": ()}, size, "falcon_recipe")
    rows = 1152
    table = grow(doublings(72, rows), 100e9 / 2048)
    return Recipe(
        model=falcon(size),
        length=2048,
        batch_size=72,
        ramp=table[1:],
        steps=steps_for(1e12, 2048, table),
        schedule=Cosine(peak=1.85e-4, warmup=round(4e9 / 2048 / rows), final=0.1),
        schedule_counts="full batches",
        objective=CausalLM(z_loss=1e-4),
    )


# (step, rows from there on)
PALM = {
    "8B": ((0, 256), (50_000, 512)),
    "62B": ((0, 512), (50_000, 1024)),
    "540B": ((0, 512), (50_000, 1024), (115_000, 2048)),
}


@preset
def palm_recipe(size: str = "8B") -> Recipe:
    """PaLM (Chowdhery et al. 2022, section 5): Adafactor without factors; z-loss of 1e-4.

    The rate is 1e-2 for 10,000 steps and 1/sqrt(step) from there on, relative to each parameter's
    root mean square ("Adam with parameter scaling"); decay is the rate squared. 540B takes 255,000
    steps, 776 B tokens, which the paper rounds to 780 B. The smaller ones double their batch once;
    at which step is not published: 50,000 is chosen, and the same 780 B tokens.
    """
    table = size_of(PALM, size, "palm_recipe")
    return Recipe(
        model=palm(size),
        length=2048,
        batch_size=table[0][1],
        ramp=table[1:],
        steps=255_000 if size == "540B" else steps_for(780e9, 2048, table),
        schedule=InverseSquareRoot(peak=1e-2, warmup=0, start=10_000),
        optimizer=Adafactor(
            decay_rate=0.8,
            factored=False,
            clipping=None,
            momentum=0.9,
            weight_decay=1.0,
            decay_exponent=2.0,
        ),
        objective=CausalLM(z_loss=1e-4),
    )


@preset
def glm_recipe(size: str = "10B") -> Recipe:
    """GLM-10B (THUDM/GLM's launch file) and GLM-130B (Zeng et al. 2022, section 2.3, table 11).

    10B: 250,000 steps of 512 tokens a row, a cosine to a tenth over 175,000, warm-up over 4 percent
    of these. The file has 21 rows a GPU and not how many GPUs; 1,024 rows are chosen. Its short
    sequences (2 percent) and its longer second stage are left out. 130B: 400 B tokens; rates go by
    samples: warm-up over 1,098,632 of them, a cosine to a tenth over 197,753,905; the batch grows
    from 192 rows by 24 at a time, over 5,493,164. Warm-up begins at 0, not at 1e-7. The gradient of
    the token embeddings is a tenth throughout, as in the table. By the training notes it rose to
    the whole over 500 steps from 6,000 on, embedding_gradient=((6000, 0.1), (6500, 1.0)), and fell
    back to a tenth when the loss exploded. From step 22,800 on the tied head's was multiplied too;
    a factor of all of a table's gradient cancels in AdamW, but for epsilon and clipping, so that
    this is left out.
    """
    if size_of({"10B": False, "130B": True}, size, "glm_recipe"):
        rows = 4224
        table = grow(range(192, rows + 1, 24), 5_493_164)
        return Recipe(
            model=glm_130b(),
            length=2048,
            batch_size=192,
            ramp=table[1:],
            steps=steps_for(400e9, 2048, table),
            schedule=Cosine(
                peak=8e-5,
                warmup=round(1_098_632 / rows),
                final=0.1,
                end=round(197_753_905 / rows),
            ),
            schedule_counts="full batches",
            embedding_gradient=((0, 0.1),),
            objective=glm_130b_objective(),
        )
    return Recipe(
        model=glm(size),
        length=512,
        batch_size=1024,
        steps=250_000,
        schedule=Cosine(peak=1e-4, warmup=7000, final=0.1, end=175_000),
        objective=glm_objective(size),
    )


@preset
def bert_recipe(size: str = "base") -> Recipe:
    """BERT (Devlin et al. 2019, appendix A.2): a million steps of 256 rows, a line to 0.

    The first 900,000 steps had rows of 128 tokens; here all have 512. Its AdamW had no correction
    of the means' bias; ours has.
    """
    return Recipe(
        model=bert(size),
        length=512,
        batch_size=256,
        steps=1_000_000,
        schedule=Linear(peak=1e-4, warmup=10_000),
        optimizer=AdamW(b1=0.9, b2=0.999, epsilon=1e-6, weight_decay=0.01),
        objective=MaskedLM(pair="next sentence"),
    )


@preset
def t5_recipe(size: str = "base") -> Recipe:
    """T5 (Raffel et al. 2020, section 3.7): a million steps of 2,048 rows, Adafactor.

    The rate is 1e-2 for 10,000 steps and 1/sqrt(step) from there on, relative to each parameter's
    root mean square. Gradients are not clipped.
    """
    return Recipe(
        model=t5(size),
        length=512,
        batch_size=2048,
        steps=1_000_000,
        schedule=InverseSquareRoot(peak=1e-2, warmup=0, start=10_000),
        optimizer=Adafactor(),
        gradient_clip=None,
        objective=SpanCorruption(),
    )
