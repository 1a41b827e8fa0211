"""Objectives of GLM and GLM-130B, by size."""

from lmjax.config import preset
from lmjax.models.gpt import size_of
from lmjax.objectives.blank_infilling import BlankInfilling
from lmjax.objectives.blanks import DocumentBlank, SentenceBlanks, TokenBlanks
from lmjax.objectives.mixed import Mixed
from lmjax.objectives.objective import TextObjective

# Shares of blanks of tokens, sentences and documents; the shortest blank of a document. By the
# sizes of the model, `glm`.
GLM_SHARES = {
    **dict.fromkeys(("110M", "335M", "roberta-large"), (1.0, 0.0, 0.0, 0.5)),
    **dict.fromkeys(("410M", "515M"), (0.5, 0.0, 0.5, 0.5)),
    **dict.fromkeys(("2B", "large-chinese", "10B-chinese"), (0.5, 0.3, 0.2, 0.5)),
    "10B": (0.5, 0.3, 0.2, 0.25),
}


@preset
def glm_objective(size: str = "110M") -> TextObjective:
    """GLM's blanks (Du et al. 2022, arXiv:2103.10360, sections 2.1 and 3.1; launch files).

    Blanks of tokens; for 410M and 515M as many rows with blanks of documents; from 2B on half of
    the rows have blanks of tokens, 30 percent of sentences, 20 percent of documents. The 10B model
    also hides a tenth of the inputs of blanks of tokens.
    """
    tokens, sentences, documents, shortest = size_of(GLM_SHARES, size, "glm_objective")
    hidden = 0.1 if size == "10B" else 0.0
    shares = {
        BlankInfilling(blanks=TokenBlanks(), block_mask_share=hidden): tokens,
        BlankInfilling(blanks=SentenceBlanks()): sentences,
        BlankInfilling(blanks=DocumentBlank(shortest=shortest)): documents,
    }
    shares = {objective: share for objective, share in shares.items() if share}
    if len(shares) == 1:
        return next(iter(shares))
    return Mixed(objectives=tuple(shares), weights=tuple(shares.values()))


@preset
def glm_130b_objective() -> Mixed:
    """GLM-130B's blanks (Zeng et al. 2022, arXiv:2210.02414, section 2.2; its configuration).

    30 percent of the rows are four samples with [MASK] for short blanks, 70 percent a text whose
    rest, at least a fifth of it, is [gMASK], in one sample with running positions. Tokens have the
    names of icetk. The multi-task instructions are a domain of the data with a weight of 5 percent:
    prompts and answers, of which the answers alone are predicted at the place of a [MASK]. They lie
    in a row as they come, not four of 512 tokens, and an answer's positions are those of other
    [MASK]s, as when a prompt is filled in; the authors' code counted on in training.
    """
    marks = dict(sop="<sop>", eop="<eop>", cross_documents=True, answers="[MASK]")
    short = BlankInfilling(blanks=TokenBlanks(), samples=4, **marks)
    rest = DocumentBlank(shortest=0.2, rest=1.0)
    long = BlankInfilling(blanks=rest, running_positions=True, **marks)
    return Mixed(objectives=(short, long), weights=(0.3, 0.7))
