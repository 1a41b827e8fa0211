"""The command: what it prints, what it refuses and with which exit code, and its reports."""

import html.parser
import re
import sys

import pytest

from lmjax.config import UserError
from lmjax.launch.experiments import load_experiment
from lmjax.parallel.schedules import schedule
from lmjax.scaling import plan_command
from lmjax.scaling.__main__ import main
from lmjax.scaling.compiled import CompiledStep, StepDoesNotFit
from lmjax.scaling.division import Division
from lmjax.scaling.plan_command import split_words
from lmjax.scaling.plan_report import pipeline_picture, write_plan
from lmjax.scaling.program import CompiledProgram
from tests.lmjax.scaling.test_program import LOOP

GPT3 = "experiments.gpt3_175b"


@pytest.fixture
def tell(monkeypatch, capsys):
    """Returns a function from words of the command line to exit code, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lmjax.scaling", *words])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_a_plan_that_fits(tell):
    code, out, err = tell(GPT3, "topology=v4:8x8x16", "mesh.fsdp=128", "tokens=1e11")
    assert (code, err) == (0, "")
    assert "174,604,259,328" in out
    assert "v4:8x8x16, 1,024 chips of 275 TFLOP/s and 33.0 GB" in out
    assert "fsdp=128 tensor=8, zero=3, remat=full" in out
    assert "12 x 1 on each of 128 shards" in out
    assert "100.0 B tokens" in out
    assert "It fits" in out
    assert re.search(r"bottleneck +matrix units", out)


def test_a_plan_that_does_not_fit_is_printed_all_the_same(tell):
    code, out, _ = tell(GPT3, "topology=v4:8x8x16")
    assert code == 0
    assert re.search(r"It does not fit: 2\.\d\d GB of a chip are missing\. It would fit with ", out)
    assert "mesh.data=4 mesh.fsdp=32" in out
    assert "mesh.data=8: the mesh is repeated" in out
    assert "Communication of a step" in out


def test_a_step_that_the_compiler_refuses_is_planned_all_the_same(tell, monkeypatch):
    def refuse(job, plan, recorded):
        raise StepDoesNotFit("it does not fit: 60 GB")

    monkeypatch.setattr(plan_command, "compile_step", refuse)
    monkeypatch.setattr(plan_command, "start_recording", lambda: None)
    code, out, _ = tell(GPT3, "topology=v4:8x8x16", "compile=true")
    assert code == 0
    assert re.search("compiled +it does not fit: 60 GB", out)
    assert "Memory of a chip" in out


def test_a_pipelines_time_by_schedule_is_not_told(tell, monkeypatch):
    step = CompiledStep(100, 200, 10**9, 1.0, CompiledProgram(LOOP))
    monkeypatch.setattr(plan_command, "compile_step", lambda job, plan, recorded: step)
    monkeypatch.setattr(plan_command, "start_recording", lambda: None)
    words = "topology=v4:8x8x16", "mesh.stage=8", "mesh.fsdp=16"
    code, out, _ = tell(GPT3, *words, "compile=true")
    assert code == 0
    assert re.search("by schedule +no time of a pipeline", out)


def test_a_pipeline(tell):
    words = "topology=a100:1024", "mesh.data=16", "mesh.fsdp=1", "mesh.stage=8"
    code, out, _ = tell(GPT3, *words, "pipeline.schedule=interleaved", "pipeline.chunks=4")
    assert code == 0
    assert "pipeline interleaved, 4 chunks" in out
    assert f"waits {7 / (96 * 4 + 7):.1%} of the time" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([GPT3], "Which experiment, and where"),
        (["topology=v4:8"], "Which experiment, and where"),
        ([GPT3, "topology=v9:8"], "known are v3, v4, v5e"),
        ([GPT3, "topology=v4:4x4x4"], "needs 128 chips, and the topology has 64"),
        ([GPT3, "topology=v4:8x8x16", "mesh.tensor=7"], "do not divide the topology's 1,024"),
        ([GPT3, "topology=v4:8x8x16", "mesh.tensor=64"], "mesh.tensor=64 does not divide"),
        ([GPT3, "topology=v4:8x8x16", "mesh.fsdp=x"], "expected a whole number"),
        ([GPT3, "topology=v4:8x8x16", "mesh.fsdp=0"], "1 or more, or -1"),
        ([GPT3, "topology=v4:8x8x16", "mesh.fsdp=2", "mesh.fsdp=4"], "set twice"),
        ([GPT3, "topology=a100:1024", "mesh.stage=7", "mesh.tensor=1"], "do not divide"),
        ([GPT3, "topology=a100:640", "mesh.stage=5", "mesh.fsdp=16"], "model.num_layers=96"),
        ([GPT3, "topology=v4:8x8x16", "stepz=3"], "stepz"),
        ([GPT3, "topology=v4:8x8x16", "report=plan.txt"], "must end in .html or .md"),
        ([GPT3, "topology=v4:8x8x16", "report=no/where/plan.md"], "there is no folder"),
        ([GPT3, "topology=v4:8x8x16", "search=true", "mesh.fsdp=2"], "leave out mesh.fsdp"),
        ([GPT3, "topology=v4:2x2x1", "search=true"], "nothing fits v4:2x2x1"),
        ([GPT3, "topology=v100:8", "serve=true", "requests.prompt=4096"], "model.max_length=2048"),
        ([GPT3, "topology=v100:8", "serve=true", "mesh.tensor=3"], "mesh.tensor=3 does not divide"),
        ([GPT3, "topology=v100:8", "serve=true", "mesh.data=2"], "mesh.tensor alone"),
        ([GPT3, "topology=v100:8", "serve=true", "search=true"], "only one of them"),
        ([GPT3, "topology=h100:128", "compile=true"], "described are the chips v4, v5e, v5p, v6e"),
        (["experiments.gpt4_175b", "topology=v4:8"], "near are experiments.gpt3_175b"),
        (["experiments.assistant", "topology=v4:8"], "Chain makes no training step"),
        (["lmjax.files", "topology=v4:8"], "no variable `experiment`"),
        (["experiments.bert_base", "topology=v4:8", "serve=true"], "continue a text"),
    ],
)
def test_what_cannot_be_is_said_with_exit_code_2(tell, words, message):
    code, _, err = tell(*words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_words_are_the_planners_or_the_experiments():
    words = [
        "experiments.x",
        "topology=v4:8",
        "prices.dollars=1",
        "mesh.fsdp=2",
        "model.remat=full",
    ]
    assert split_words(words) == (words[:3], words[3:])


def test_help_lists_the_settings(tell):
    code, out, _ = tell("--help")
    assert code == 0
    assert all(name in out for name in ("topology", "carbon: float", "serve", "search", "report"))


def test_other_kinds_of_models(tell):
    for name in ("t5_base", "bert_base", "glm_130b", "palm_540b"):
        words = "topology=v5p:4x4x4", "mesh.fsdp=8", "mesh.tensor=8", "mesh.data=1"
        small = "topology=v5p:2x2x1", "mesh.fsdp=4"
        code, out, err = tell(f"experiments.{name}", *(small if "_base" in name else words))
        assert (code, err) == (0, ""), name
        assert "MFU" in out


def test_a_mixture_of_experts(tell):
    code, out, err = tell("experiments.mixtral_8x7b", "topology=v5p:4x4x4")
    assert (code, err) == (0, "")
    assert "fsdp=8 expert=8" in out
    assert "tokens to experts" in out
    assert "tokens over expert" in out
    words = "topology=h100:8", "serve=true", "mesh.tensor=2"
    code, out, _ = tell("experiments.mixtral_8x7b", *words)
    assert (code, "It fits" in out) == (0, True)


def test_thirteen_billion_parameters_fit_a_v100(tell):
    code, out, _ = tell(GPT3, "topology=v100:1", "serve=true", "model=opt:13B")
    assert code == 0
    assert "12,853,473,280, of 16 bits" in out
    assert "It fits" in out


def test_a_search_finds_the_best(tell):
    code, out, _ = tell(GPT3, "topology=v4:2x2x4", "model.num_layers=12", "search=true")
    assert code == 0
    assert "The best divisions" in out
    assert "memory: it does not fit" in out
    assert "recomputation" in out


class Tags(html.parser.HTMLParser):
    """Checks that tags are closed in their order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_is_well_formed(tell, tmp_path):
    words = "topology=a100:1024", "mesh.data=16", "mesh.fsdp=1", "mesh.stage=8"
    path = tmp_path / "plan.html"
    code, out, _ = tell(GPT3, *words, f"report={path}")
    assert (code, str(path) in out) == (0, True)
    text, tags = path.read_text("utf-8"), Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.seen.count("svg") == 1
    assert "__" not in text
    assert "gpt3_175b on a100-80gb:1024" in text
    assert re.search(r'<i class="over" style="width:100.0%">|<i style="width:\d', text)


def test_markdown_has_the_same_tables(tell, tmp_path):
    path = tmp_path / "plan.md"
    assert tell(GPT3, "topology=v4:8x8x16", f"report={path}")[0] == 0
    text = path.read_text("utf-8")
    assert text.startswith("# gpt3_175b on v4:8x8x16\n")
    assert "## Memory of a chip" in text
    assert re.search(r"\| optimizer \| 10\.97 \| 33\.2% \|", text)


def test_a_picture_has_a_box_for_each_unit_of_work():
    division = Division(stage=4, microbatches=8, schedule="zb_h1")
    made = schedule("zb_h1", 4, 8)
    units = sum(len(units) for row in made.ticks for units in row)
    assert pipeline_picture(division).count("<rect") == units
    many = Division(stage=64, microbatches=640)
    assert "16 of 64 stages, 32 of 640 microbatches" in pipeline_picture(many)


def test_words_in_a_page_are_no_tags(tmp_path):
    path = str(tmp_path / "plan.html")
    write_plan(path, "a <b>", [("x", "<script>")], [])
    text = (tmp_path / "plan.html").read_text()
    assert "a &lt;b&gt;" in text
    assert "<script>" not in text


def test_an_experiment_must_exist():
    with pytest.raises(UserError, match="No module named 'experimentz'"):
        load_experiment("experimentz.gpt3_175b")
