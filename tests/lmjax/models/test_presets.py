"""The presets against the papers: parameter counts, initialisation, cache sizes."""

import jax
import numpy as np
import pytest

from lmjax.config import replace
from lmjax.models import (
    baichuan,
    baichuan2,
    bert,
    bloom,
    chatglm,
    chatglm2,
    chatglm3,
    falcon,
    gemma2,
    glam,
    glm,
    glm_130b,
    gpt1,
    gpt2,
    gpt3,
    grok1,
    llama,
    llama2,
    mistral,
    mixtral,
    opt,
    palm,
    qwen,
    skywork,
    switch,
    t5,
    t5_v1_1,
    xlnet,
)
from lmjax.scaling.flops import (
    cache_bytes_per_token,
    count_parameters,
    forward_flops_per_token,
)

# Counted by building the reference's class without allocating it, or by the closed formula of the
# paper; Mistral's and Gemma 2's from their published weights.
COUNTS = {
    gpt1: {"117M": 116_534_784},
    gpt2: {
        "124M": 124_439_808,
        "355M": 354_823_168,
        "774M": 774_030_080,
        "1.5B": 1_557_611_200,
    },
    gpt3: {
        "125M": 125_226_240,
        "350M": 355_871_744,
        "760M": 760_300_032,
        "1.3B": 1_315_723_264,
        "2.7B": 2_651_553_280,
        "6.7B": 6_658_404_352,
        "13B": 12_853_386_240,
        "175B": 174_604_259_328,
    },
    opt: {
        "125M": 125_239_296,
        "350M": 331_196_416,
        "1.3B": 1_315_758_080,
        "2.7B": 2_651_596_800,
        "6.7B": 6_658_473_984,
        "13B": 12_853_473_280,
        "30B": 29_974_540_288,
        "66B": 65_719_701_504,
        "175B": 174_604_468_224,
    },
    bloom: {
        "560M": 559_214_592,
        "1.1B": 1_065_314_304,
        "1.7B": 1_722_408_960,
        "3B": 3_002_557_440,
        "7.1B": 7_069_016_064,
        "176B": 176_247_271_424,
    },
    llama: {
        "7B": 6_738_415_616,
        "13B": 13_015_864_320,
        "33B": 32_528_943_616,
        "65B": 65_285_660_672,
    },
    llama2: {"7B": 6_738_415_616, "13B": 13_015_864_320, "70B": 68_976_648_192},
    baichuan: {"7B": 7_000_559_616, "13B": 13_264_901_120},
    baichuan2: {"7B": 7_505_973_248, "13B": 13_896_668_160},
    qwen: {
        "1.8B": 1_836_828_672,
        "7B": 7_721_324_544,
        "14B": 14_167_290_880,
        "72B": 72_287_920_128,
    },
    skywork: {"13B": 13_854_113_280},
    falcon: {"7B": 6_921_720_704, "40B": 41_303_293_952},
    palm: {"8B": 8_632_012_800, "62B": 62_495_662_080, "540B": 540_356_474_880},
    glm: {
        "110M": 109_338_624,
        "335M": 334_688_256,
        "410M": 410_265_600,
        "515M": 514_632_960,
        "roberta-large": 354_873_344,
        "large-chinese": 355_659_776,
        "2B": 1_920_122_880,
        "10B": 9_880_682_496,
        "10B-chinese": 9_879_633_920,
    },
    glm_130b: {"130B": 128_697_794_560},
    chatglm: {"6B": 6_173_286_400},
    chatglm2: {"6B": 6_243_584_000},
    chatglm3: {"6B": 6_243_584_000},
    mistral: {"7B": 7_241_732_096},
    # Published: 46.7 and 140.6 billion; 314 billion; 1.571 trillion.
    mixtral: {"8x7B": 46_702_792_704, "8x22B": 140_620_634_112},
    grok1: {"314B": 315_684_820_992},
    switch: {"base": 7_415_217_408, "large": 26_309_291_008, "C": 1_571_308_972_448},
    glam: {"64B": 1_161_756_160_000},
    t5: {
        "small": 60_506_624,
        "base": 222_903_552,
        "large": 737_668_096,
        "3B": 2_851_598_336,
        "11B": 11_307_321_344,
    },
    t5_v1_1: {
        "small": 76_961_152,
        "base": 247_577_856,
        "large": 783_150_080,
        "xl": 2_849_757_184,
        "xxl": 11_135_332_352,
    },
    xlnet: {"base": 116_750_336, "large": 360_300_800},
    bert: {"base": 110_106_428, "large": 336_226_108},
    gemma2: {"2B": 2_614_341_888, "9B": 9_241_705_984, "27B": 27_227_128_320},
}


@pytest.mark.parametrize(
    ("preset", "size", "count"),
    [(preset, size, count) for preset, sizes in COUNTS.items() for size, count in sizes.items()],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_parameter_count(preset, size, count):
    assert count_parameters(preset(size)).total == count


@pytest.mark.parametrize(
    ("config", "published"),
    [(mixtral("8x7B"), 12.9e9), (mixtral("8x22B"), 39e9), (grok1(), 0.25 * 314e9)],
    ids=["mixtral 8x7B", "mixtral 8x22B", "grok-1"],
)
def test_active_parameters_of_mixtures(config, published):
    """Mixtral's announcements say 12.9 and 39 billion, Grok-1's "25 % of the weights"."""
    count = count_parameters(config)
    experts, share = config.feed_forward, config.feed_forward.router.chosen / 8
    of_experts = config.num_layers * experts.experts * 3 * config.hidden * experts.size
    assert count.active == count.total - round(of_experts * (1 - share))
    digits = 0.005 if config.attention.softcap is None else 0.07
    assert count.active == pytest.approx(published, rel=digits)
    # FLOPs are those of the active parameters, two for each, and of attention.
    flops = forward_flops_per_token(config, 1)
    norms = (2 if config.attention.softcap is None else 4) * config.num_layers + 1
    used = count.active - norms * config.hidden
    if not config.tied_head:
        used -= config.vocab_size * config.hidden
    width = 2 * 2 * config.attention.num_heads * config.attention.head_dim
    assert flops == pytest.approx(2 * used + width * config.pairs(1, 1), rel=1e-9)


@pytest.mark.parametrize(
    ("size", "total"), [("0.1B", 1.9e9), ("1.7B", 27e9), ("8B", 143e9), ("64B", 1.2e12)]
)
def test_parameters_of_glam_are_published_without_its_embeddings(size, total):
    """To the two or three digits of the paper's table 4."""
    count = count_parameters(glam(size))
    digits = {1.9e9: 2, 1.2e12: 2, 27e9: 2, 143e9: 3}[total]
    assert float(f"{count.total - count.embeddings:.{digits - 1}e}") == total


def test_active_parameters_of_glam_and_switch():
    """96.6 B of a token (GLaM, table 4); Switch-Base is T5-Base and its routers."""
    assert count_parameters(glam("64B")).active == pytest.approx(96.6e9, rel=5e-4)
    routers = 2 * 6 * 768 * 128
    assert count_parameters(switch("base")).active == count_parameters(t5("base")).total + routers


# Standard deviation of each kind of matrix, for 24 layers and 400 inputs.
DEVIATIONS = {
    gpt1: {"embedding": 0.02, "weight": 0.02, "residual": 0.02},
    gpt2: {"embedding": 0.02, "positions": 0.01, "weight": 0.02, "residual": 0.02 / 48**0.5},
    opt: {"embedding": 0.006, "positions": 0.006, "weight": 0.006, "residual": 0.006 / 48**0.5},
    bloom: {"embedding": 0.0048, "weight": 0.0048, "residual": 0.0048 / 48**0.5},
    baichuan: {"embedding": 0.02, "head": 0.02, "weight": 0.02, "residual": 0.02},
    # Uniform within 1 / sqrt(inputs): divided by sqrt(3) that is the deviation.
    baichuan2: {"embedding": 0.02, "head": 1 / 1200**0.5, "weight": 0.02, "residual": 0.02},
    qwen: {"embedding": 0.02, "head": 0.02, "weight": 0.02, "residual": 0.02 / 48**0.5},
    falcon: {"embedding": 0.02, "weight": 0.02, "residual": 0.02},
    # What is left of a normal's deviation when more than two of it are cut away: 0.8796.
    bert: {"embedding": 0.017592, "weight": 0.017592, "residual": 0.017592},
    # Queries 1 / sqrt(inputs head_dim), T5's table of buckets like a weight.
    t5: {"embedding": 1.0, "query": 0.05 / 8, "weight": 0.05, "relative": 0.05, "residual": 0.05},
    palm: {"embedding": 1.0, "weight": 0.05, "residual": 0.05},
    glm: {"embedding": 0.02, "positions": 0.02, "weight": 0.02, "residual": 0.02 / 48**0.5},
    # Xavier-normal of 400 inputs and 100 outputs, times 1 / sqrt(2 layers).
    glm_130b: {
        "embedding": 0.0052,
        "query": 0.0052,
        "weight": 0.0052,
        "value": (2 / 500 / 48) ** 0.5,
        "feed_forward": (2 / 500 / 48) ** 0.5,
        "residual": (2 / 500 / 48) ** 0.5,
    },
}


@pytest.mark.parametrize("preset", DEVIATIONS, ids=lambda preset: preset.__name__)
def test_initialisation(preset):
    """Within 2 percent: 40,000 draws give the deviation to some 0.4."""
    for kind, deviation in DEVIATIONS[preset].items():
        draw = preset().initializer.draw(kind, num_layers=24, fan_in=400)
        numbers = np.asarray(draw(jax.random.key(0), (400, 100), np.float32))
        assert abs(numbers.mean()) < 0.03 * deviation, kind
        np.testing.assert_allclose(numbers.std(), deviation, rtol=0.02, err_msg=kind)


def test_cache_of_a_token():
    """What multi-query attention saves: ChatGLM-6B's 32 key heads against ChatGLM2-6B's 2."""
    assert cache_bytes_per_token(replace(chatglm(), dtype="bfloat16")) == 458_752
    assert cache_bytes_per_token(replace(chatglm2(), dtype="bfloat16")) == 28_672
