"""Recipes of papers from a pretrained model to an assistant: chains of jobs with their numbers.

    experiment = instructgpt("1.3B", "runs/mine", Mesh(fsdp=8), accumulation=8)

The numbers are the papers', some of them as they are remembered; what a paper leaves open stands in
the docstring with what is chosen instead. Where it says nothing, Adam has GPT-3's means without
decay and gradients are clipped to 1.0. A batch is counted in rows, and a row of fine-tuning holds
as many conversations as fit: where papers count conversations, fewer rows are taken. None of the
papers' data are public; paths are those of files of one's own, JSON lines as the sources read them.
"""

from __future__ import annotations

from lmjax.alignment import ClippedPolicy, FixedKL
from lmjax.alignment.gated_reward import GatedReward
from lmjax.alignment.ghost_attention import GhostAttention
from lmjax.alignment.model_reward import ModelReward
from lmjax.alignment.reward_ranking import RewardRanking
from lmjax.alignment.value_network import ValueNetwork
from lmjax.config import replace
from lmjax.data import Conversations, Data, Domain, JsonLines, Source
from lmjax.data.chat.catalogue import chat_template
from lmjax.data.chat.comparisons import Comparisons
from lmjax.data.chat.requests import Requests
from lmjax.data.chat.templates import ChatTemplate
from lmjax.generation.sampling import Sampling
from lmjax.jobs.best import BestCheckpoint
from lmjax.jobs.best_of_n import BestOfN
from lmjax.jobs.chain import Chain
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.policy_optimization import PolicyOptimization
from lmjax.jobs.reward_model import RewardModel
from lmjax.jobs.settings import ChatEvaluation, Checkpoints
from lmjax.models import TransformerConfig, gpt3, llama2
from lmjax.models.gpt import size_of
from lmjax.objectives import ChatLM
from lmjax.parallel import Mesh
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Constant, Cosine

ADAM = AdamW(b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.0)
HIGHEST_REWARD = BestCheckpoint(measure="reward", better="higher")


def for_accelerators(model: TransformerConfig) -> TransformerConfig:
    """A model that computes in bfloat16 and keeps a layer's input alone, as large ones have to."""
    return replace(model, dtype="bfloat16", remat="full")


def mixture(length: int, batch_size: int, *domains: Domain, held_out: float = 0.05) -> Data:
    """Conversations, perhaps with text, in rows that each hold as many of them as fit."""
    data = Data(train=domains, held_out=held_out, length=length, batch_size=batch_size)
    return replace(data, rows="whole_documents", workers=4, tokenize_workers=8)


def groups(length: int, batch_size: int, *domains: Domain) -> Data:
    """Comparisons or requests, of which a row holds one."""
    return replace(mixture(length, batch_size, *domains), rows="groups")


def domain(name: str, source: Source, weight: float = 1.0) -> Domain:
    """Text of a source under a name."""
    return Domain(name=name, source=source, weight=weight)


def instructions(name: str, path: str, template: ChatTemplate, weight: float = 1.0) -> Domain:
    """Conversations of a file."""
    return domain(name, Conversations(path=path, template=template), weight)


def compared(
    name: str, path: str | tuple[str, ...], template: ChatTemplate, weight: float = 1.0
) -> Domain:
    """Compared answers of a file, or of several."""
    return domain(name, Comparisons(path=path, template=template), weight)


def asked(path: str, template: ChatTemplate, *metadata: str) -> Domain:
    """Requests of a file."""
    return domain("prompts", Requests(path=path, template=template, metadata=metadata))


# size of GPT-3, rates: of fine-tuning, of PPO's start, of PPO, of its critic
INSTRUCTGPT = {
    "1.3B": ("1.3B", 9.65e-6, 5.0e-6, 5.0e-6, 9e-6),
    "6B": ("6.7B", 9.65e-6, 1.04e-5, 5.0e-6, 9e-6),
    "175B": ("175B", 5.03e-6, 2.45e-6, 2.55e-6, 5e-6),
}
BARE = chat_template("bare")
DEMONSTRATIONS = instructions("demonstrations", "data/demonstrations.jsonl", BARE)
TEXT = JsonLines(path="text/pretraining/*.jsonl.zst")


def instructgpt(size: str, output: str, mesh: Mesh, accumulation: int) -> Chain:
    """InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, appendix C): 1.3B, 6B, 175B.

    Fine-tuning for 16 epochs with dropout of 0.2; a reward model of 6B, on all pairs of 4 to 9
    answers to each of 64 requests a step; PPO's start, a pretrained model after two epochs on
    demonstrations with 10 % of pretraining text; PPO-ptx: 256,000 episodes in steps of 512, eight
    updates a step each with 64 episodes and 512 rows of text, whose loss weighs 27.8.

    Of the paper are all rates but PPO's, which is chosen: it says that rates above 8e-6 diverged
    (as remembered). Batches of fine-tuning are 32 demonstrations, of which a row of 2,048 tokens
    holds about 4: 8 rows; 175B has 8 demonstrations there, and the 8 rows that its mesh can share
    here. The paper chose among the checkpoints of fine-tuning by the score of a reward model; here
    it is the last one, with all others kept. Its reward model began as a GPT-3 that was tuned on
    public tasks; here as the fine-tuned 6B, of which it says that the results are similar. It
    shifted scores so that demonstrations have 0 on average, which moves nothing but the values.
    lambda of GAE and the clipping of values are not published; 0.95 and 0.2 are chosen. The price
    of divergence is for leaving PPO's start, in the paper for leaving the fine-tuned model.

    Args:
      size: of the policy.
      output: folder of the chain.
      mesh: of all jobs.
      accumulation: parts of an update of PPO, and of a step of the reward model.
    """
    gpt, sft, start, rate, critic = size_of(INSTRUCTGPT, size, "instructgpt")
    larger = () if size == "6B" else (_demonstrated("6.7B", "sft_6b", 9.65e-6),)
    judge = "{output}/sft_6b" if larger else "{output}/sft"
    policy = PolicyOptimization(
        output="{output}/policy",
        begin_with="{output}/start",
        steps=500,
        data=groups(1024, 512, asked("data/prompts.jsonl", BARE)),
        rewards=(ModelReward(folder="{output}/reward"),),
        reward_kl=FixedKL(beta=0.02),
        samples=1,
        reply_length=1024,
        advantage="gae",
        value_network=ValueNetwork(
            folder="{output}/reward",
            optimizer=ADAM,
            schedule=Constant(peak=critic, warmup=0),
        ),
        pretraining=Data(
            train=(domain("text", TEXT),), held_out=1e-4, length=2048, batch_size=4096
        ),
        pretraining_weight=27.8,
        updates=8,
        optimizer=ADAM,
        schedule=Constant(peak=rate, warmup=10),
        ema_decay=0.992,
        accumulation=accumulation,
        evaluate_every=25,
        checkpoint=Checkpoints(every=25),
    )
    supervised = _demonstrated(gpt, "sft", sft), *larger
    jobs = *supervised, _ranked(judge, accumulation), _start(gpt, start), policy
    return Chain(output=output, jobs=tuple(replace(job, mesh=mesh) for job in jobs))


def _demonstrated(size: str, name: str, rate: float) -> Finetune:
    """Fine-tuning of InstructGPT on demonstrations."""
    return Finetune(
        output=f"{{output}}/{name}",
        begin_with=f"runs/gpt3_{size.lower().replace('.', '_')}",
        epochs=16,
        model=replace(for_accelerators(gpt3(size)), dropout=0.2),
        data=mixture(2048, 8, DEMONSTRATIONS),
        optimizer=ADAM,
        schedule=Cosine(peak=rate, warmup=0, final=0.1),
        evaluation=ChatEvaluation(every=300),
        checkpoint=Checkpoints(every=300, keep=32),
    )


def _ranked(begin_with: str, accumulation: int) -> RewardModel:
    """The reward model of InstructGPT."""
    return RewardModel(
        output="{output}/reward",
        begin_with=begin_with,
        epochs=1,
        objective=RewardRanking(answers=9),
        data=groups(2048, 64, compared("rankings", "data/rankings.jsonl", BARE)),
        optimizer=ADAM,
        schedule=Cosine(peak=9e-6, warmup=0, final=0.1),
        accumulation=accumulation,
        evaluation=ChatEvaluation(every=100),
        checkpoint=Checkpoints(every=100),
    )


def _start(size: str, rate: float) -> Finetune:
    """The start of PPO: demonstrations and pretraining text."""
    text = domain("text", TEXT, weight=0.1)
    return replace(
        _demonstrated(size, "start", rate),
        epochs=2,
        data=mixture(2048, 8, replace(DEMONSTRATIONS, weight=0.9), text),
        checkpoint=Checkpoints(every=300),
    )


# rate of the reward models, price of divergence
LLAMA2_CHAT = {"7B": (1e-5, 0.01), "13B": (1e-5, 0.01), "70B": (5e-6, 0.005)}
LLAMA2 = chat_template("llama2")
LLAMA2_ADAM = AdamW(b1=0.9, b2=0.95, epsilon=1e-5, weight_decay=0.1)


def llama2_chat(size: str, output: str, mesh: Mesh, accumulation: int, rounds: int = 1) -> Chain:
    """LLaMA 2 Chat (Touvron et al. 2023b, arXiv:2307.09288, sections 3.1 to 3.3): 7B, 13B, 70B.

    Fine-tuning on 27,540 conversations; a helpful and a safety reward model, each on its own
    comparisons and a share of the others', with the margins that the lines have (1, 2/3, 1/3 and 0
    by the grade, or 3, 2, 1 and 0); rejection sampling, the best of ten replies at a temperature of
    1.2 with the instruction in every message of the user, and fine-tuning on the last replies; PPO
    in steps of 512 replies, eight updates each, with the gate of 0.15 between the rewards, which
    are whitened.

    Of fine-tuning and reward models the numbers are as remembered. The paper has five rounds, each
    with new comparisons by people of replies of the last model: reward models, sampling and
    fine-tuning are repeated, and PPO follows once. Comparisons of the second round are read from
    data/helpful_comparisons_2.jsonl and so on; as long as they are not there the chain ends before
    that round, and the same command goes on later. Replies of earlier rounds remain candidates for
    the best. Only the paper's 70B samples, and the smaller ones learn from those replies too: set
    jobs.3.policy to a 70B. Fine-tuning on best replies has the rate of fine-tuning, and one epoch;
    the critic begins as the helpful model and has the policy's rate; comparisons are cut to 2,048
    tokens; all this is chosen. Steps of the reward models' warm-up are 3 % of an epoch of all the
    paper's comparisons. PPO makes 400 steps,
    of which the one with the best reward on held-out requests is kept.

    Args:
      size: of all models.
      output: folder of the chain.
      mesh: of all jobs.
      accumulation: parts of a step of the reward models.
      rounds: of comparisons, 5 in the paper.
    """
    rate, beta = size_of(LLAMA2_CHAT, size, "llama2_chat")
    learnt = instructions("instructions", "data/instructions.jsonl", LLAMA2)
    sft = Finetune(
        output="{output}/sft",
        begin_with=f"models/Llama-2-{size.lower()}-hf",
        epochs=2,
        model=for_accelerators(llama2(size)),
        data=mixture(4096, 64, learnt),
        optimizer=LLAMA2_ADAM,
        schedule=Cosine(peak=2e-5, warmup=0, final=0.1),
        evaluation=ChatEvaluation(every=50),
        checkpoint=Checkpoints(every=50),
    )
    repeated = (job for n in range(1, rounds + 1) for job in _round(n, sft, rate, accumulation))
    jobs = (sft, *repeated, _gated(beta, rounds))
    return Chain(output=output, jobs=tuple(replace(job, mesh=mesh) for job in jobs))


def _round(
    number: int, sft: Finetune, rate: float, accumulation: int
) -> tuple[RewardModel, RewardModel, BestOfN, Finetune]:
    """A round of LLaMA 2 Chat, counted from 1: two reward models, sampling, the best replies."""
    last = _of_round("rejection", number - 1) if number > 1 else sft.output
    helpful = {"helpful": 0.5, "safety": 0.25, "open": 0.25}
    best = f"{_of_round('samples', number)}/replies/*.jsonl"
    return (
        _judge("helpful", number, helpful, rate, accumulation),
        _judge("safety", number, {"safety": 0.9, "helpful": 0.1}, rate, accumulation),
        _best_replies(number, last),
        replace(
            sft,
            output=_of_round("rejection", number),
            begin_with=last,
            epochs=1,
            objective=ChatLM(loss_on="last"),
            data=mixture(4096, 64, instructions("best", best, LLAMA2)),
        ),
    )


def _of_round(name: str, number: int) -> str:
    """The output of a job of a round; those of the first have no number."""
    return f"{{output}}/{name}" + (f"_{number}" if number > 1 else "")


def _gate(number: int) -> GatedReward:
    """The reward of the models of a round."""
    helpful, safety = (ModelReward(folder=_of_round(n, number)) for n in ("helpful", "safety"))
    return GatedReward(helpful=helpful, safety=safety, tag="safety")


def _judge(
    name: str, number: int, weights: dict[str, float], rate: float, accumulation: int
) -> RewardModel:
    """A reward model of LLaMA 2 Chat, on comparisons of several files by their weights.

    All those of people up to its round; the open ones are of the first.
    """

    def files(one: str) -> str | tuple[str, ...]:
        later = range(2, number + 1) if one != "open" else ()
        found = f"data/{one}_comparisons.jsonl"
        return (found, *(f"data/{one}_comparisons_{n}.jsonl" for n in later)) if later else found

    domains = (compared(one, files(one), LLAMA2, weight) for one, weight in weights.items())
    return RewardModel(
        output=_of_round(name, number),
        begin_with="{output}/sft",
        epochs=1,
        data=groups(2048, 512, *domains),
        optimizer=LLAMA2_ADAM,
        schedule=Cosine(peak=rate, warmup=171, final=0.1),
        accumulation=accumulation,
        evaluation=ChatEvaluation(every=500),
        checkpoint=Checkpoints(every=500),
    )


def _best_replies(number: int, policy: str) -> BestOfN:
    """Rejection sampling of LLaMA 2 Chat, with Ghost Attention."""
    return BestOfN(
        output=_of_round("samples", number),
        policy=policy,
        requests=asked("data/prompts.jsonl", LLAMA2, "safety").source,
        rewards=(_gate(number),),
        earlier=tuple(f"{_of_round('samples', n)}/replies/*.jsonl" for n in range(1, number)),
        ghost_attention=GhostAttention(),
        samples=10,
        request_length=3072,
        reply_length=1024,
        sampling=Sampling(temperature=1.2),
        batch_size=64,
    )


def _gated(beta: float, rounds: int) -> PolicyOptimization:
    """PPO of LLaMA 2 Chat, on the model of rejection sampling."""
    constant = Constant(peak=1e-6, warmup=0)
    helpful = _of_round("helpful", rounds)
    network = ValueNetwork(folder=helpful, optimizer=LLAMA2_ADAM, schedule=constant)
    return PolicyOptimization(
        output="{output}/policy",
        begin_with=_of_round("rejection", rounds),
        steps=400,
        objective=ClippedPolicy(clip=0.2),
        data=groups(3072, 512, asked("data/prompts.jsonl", LLAMA2, "safety")),
        rewards=(_gate(rounds),),
        reward_kl=FixedKL(beta=beta),
        samples=1,
        reply_length=1024,
        whiten_rewards=True,
        advantage="gae",
        value_network=network,
        updates=8,
        optimizer=LLAMA2_ADAM,
        schedule=constant,
        evaluate_every=25,
        checkpoint=Checkpoints(every=25, best=HIGHEST_REWARD),
    )
