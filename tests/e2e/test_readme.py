"""What the README and the documentation say is done here: snippets run, commands parse, files and methods are there."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")

import numpy as np
import timm
import transformers
import typer.main
from PIL import Image
from test_report_browser import CHROMIUM, FLAGS

import vtok
from vtok.eval import docs
from vtok.eval.cli.program import app
from vtok.serving import TokenChoice, VLMInfo

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "assets" / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))
}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


SNIPPETS = {page: found for page, text in PAGES.items() if (found := blocks(text, "python"))}
COMMANDS = sorted(
    {
        line.split("  #")[0].strip()
        for text in PAGES.values()
        for block in blocks(text, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    }
)


def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def clip_pipeline(task, model):
    """The pipeline of that task around a tiny CLIP: weights by name need a network."""
    from test_hf_pipelines import clip, pipeline, processor, tokenizer
    from transformers import CLIPImageProcessor

    tiny = clip()
    words = ["This", "is", "a", "photo", "of", "cat.", "dog."]
    return pipeline(task, model=tiny, tokenizer=tokenizer(words), image_processor=processor(CLIPImageProcessor))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Pretrained models become random, tiny or bundled ones; everything else in a snippet is taken as it stands."""
    create, llava = timm.create_model, ROOT / "assets" / "easyvqa_llava"
    narrow = {"embed_dim": 96, "num_heads": 3}  # of all plain ViTs that pages name: a forward pass is a few milliseconds
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **extra: create(name, **narrow, **extra))
    for cls in (transformers.AutoProcessor, transformers.LlavaForConditionalGeneration):
        load = cls.from_pretrained.__func__
        monkeypatch.setattr(
            cls, "from_pretrained", classmethod(lambda cls, name, load=load, **extra: load(cls, llava, **extra))
        )
    from test_hf_pipelines import clip  # noqa: F401  (imports the real pipeline before it is replaced)

    # A lazy module, which puts a new object into sys.modules now and then: the name is replaced where it is defined, too.
    monkeypatch.setattr(sys.modules["transformers.pipelines"], "pipeline", clip_pipeline)
    monkeypatch.setattr(sys.modules["transformers"], "pipeline", clip_pipeline)
    open_clip = pytest.importorskip("open_clip")
    make, folder = open_clip.create_model_and_transforms, ROOT / "assets" / "easyvqa_clip"
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda name, pretrained: make(f"local-dir:{folder}"))
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    photo().save("photo.jpg")


def run_snippets(page):
    """One after the other, as a reader would; `images` and `image` are all that they are given."""
    torch.manual_seed(0)
    names = {"images": torch.randn(2, 3, 224, 224), "image": photo(), "vtok": vtok}
    for number, snippet in enumerate(SNIPPETS[page]):
        exec(compile(snippet, f"{page}, snippet {number}", "exec"), names)
    return names


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if page.endswith(("export.md", "evaluate.md")) else []) for page in SNIPPETS],
)
def test_every_snippet_runs_in_order(page, offline, capsys):
    """Exporting and evaluating take half a minute: they are left to `make test-all`."""
    if page.endswith("export.md"):
        pytest.importorskip("onnxruntime")
    names = run_snippets(page)
    if page == "README.md":
        assert len(SNIPPETS[page]) >= 4
        assert "tome(r=13)" in capsys.readouterr().out, "the table of the first snippet: a gain that was measured"
        assert names["answer"].shape[0] == 1


def test_the_guides_have_snippets():
    for page in ("encoders", "clip", "vlm", "training", "serving", "export"):
        assert SNIPPETS[f"assets/docs/quickstart/{page}.md"]


def parse(command, words):
    """Walks down to the sub-command and lets it read its arguments, without running it."""
    context = None
    while hasattr(command, "commands"):
        context = typer.Context(command, info_name=command.name, parent=context)
        _, command, words = command.resolve_command(context, list(words))
    command.make_context(command.name, list(words))


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line):
    words = shlex.split(line)
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    if words[:2] == ["torchrun", "--nproc_per_node"]:
        words = words[3:]
    if words[:2] == ["-m", "vtok.eval"]:
        words = ["vtok", *words[2:]]
    program, *rest = words
    if program == "vtok":
        parse(typer.main.get_command(app), rest)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(rest) <= set(targets)
    elif program == "vllm":
        settings = json.loads(rest[rest.index("--hf-overrides") + 1])["vtok"]
        assert rest[0] == "serve" and TokenChoice(settings, VLMInfo("a model", 4, 16, 2)).tower_blocks == ()
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]) is not None
    elif program == "python":
        assert (ROOT / rest[0]).is_file()
    else:
        assert program in ("pip", "lmms-eval", "jupyter")


@pytest.mark.parametrize("page", PAGES)
def test_every_file_it_names_is_there(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", PAGES[page])
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing
    assert page != "README.md" or links


def test_a_newcomer_reads_it_in_five_minutes():
    """About 230 words a minute; tables and code are looked at, not read."""
    prose = re.sub(r"^```.*?^```|^\|.*?$", "", README, flags=re.S | re.M)
    assert len(prose.split()) < 800
    lines = README.splitlines()
    assert len(lines) <= 158
    assert max(map(len, lines)) <= 200
    tables = re.findall(r"(?:^\|.*\n)+", README, re.M)
    assert tables and max(table.count("\n") for table in tables) <= 8 + 2


def test_it_is_cited_as_the_file_of_citations_says():
    told = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (entry,) = blocks(README, "bibtex")
    assert re.search(r"title = {(.+?)}", entry)[1] == re.search(r'^title: "(.+)"$', told, re.M)[1]
    assert re.search(r"version = {(.+?)}", entry)[1] == vtok.__version__
    assert re.search(r"author = {{(.+?)}}", entry)[1] in told


def test_every_method_has_a_section():
    """On the page of methods, with a marker that brings its knobs; on the page of classes; and in the README."""
    page, classes = PAGES["assets/docs/methods.md"], PAGES["assets/docs/api/methods.md"]
    own = [name for name in vtok.METHODS.names() if vtok.METHODS.get(name).__module__.startswith("vtok.")]
    assert re.findall(r"^### (\w+)\n", page, re.M) == re.findall(r"^<!-- method: (\w+) -->$", page, re.M)
    assert sorted(re.findall(r"^### (\w+)\n", page, re.M)) == own
    for name in own:
        cls = vtok.METHODS.get(name)
        assert f"::: {cls.__module__}.{cls.__name__}\n" in classes
        assert f"`{name}`" in README


@pytest.mark.parametrize("name", vtok.METHODS.names())
def test_every_knob_is_described(name):
    pytest.importorskip("griffe")
    found = docs.knobs(name)
    defaults = {key for key in vtok.METHODS.get(name)().to_dict() if key != "method"}
    assert set(found) == defaults and all(meaning for _, meaning in found.values())


def test_markers_say_what_is_wrong():
    for marker, message in (
        ("include: nowhere.md", "nowhere.md, which is no file"),
        ("include: CONTRIBUTING.md # Nothing", "has no such heading"),
        ("method: nothing", "nothing"),
    ):
        with pytest.raises(vtok.VtokError, match=message):
            docs.on_page_markdown(f"# A page\n\n<!-- {marker} -->\n")


def test_included_headings_go_one_level_down():
    made = docs.on_page_markdown("# A page\n\n<!-- include: CONTRIBUTING.md # Style -->\n")
    assert "\n### Style\n" in made
    assert docs.on_page_markdown("<!-- include: CHANGELOG.md -->\n").startswith("# Changelog\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """`make docs`: strictly, so that no link inside is broken."""
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "assets" / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


@pytest.mark.slow
def test_the_site_is_whole(site):
    """Nothing on a page comes from elsewhere, and every marker was replaced."""
    pages = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert set(PAGES) - {"README.md"} == {f"assets/docs/{name.removesuffix('.html')}.md" for name in pages} - {
        "assets/docs/404.md"
    }
    for name, text in pages.items():
        assert not re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^\"> ]+", text), name
        assert not re.findall(r"<!-- (?:include|method|tables)", text), name
    assert "276 of the 297" in pages["support.html"]
    assert 'id="tome"' in pages["methods.html"] and "tome_vit_s_augreg_r13" in pages["methods.html"]
    assert 'id="vtok.api.patch"' in pages["api/index.html"] and "An earlier patch is removed first" in pages["api/index.html"]
    assert 'id="vtok.methods.tome.ToMe"' in pages["api/methods.html"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path (apt-get install chromium)")
def test_the_search_needs_no_server(site):
    """Pages opened as files, at the top and in a folder: a word is found, and nothing is asked of the network."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page, elsewhere = browser.new_page(), []
        page.on("request", lambda asked: elsewhere.append(asked.url) if asked.url.startswith("http") else None)
        for start in ("index.html", "quickstart/vlm.html"):
            page.goto((site / start).as_uri())
            page.click(".md-search__input")
            page.keyboard.type("zero_tprune")
            page.wait_for_selector(".md-search-result__item a", timeout=30_000)
            assert any("methods.html" in link.get_attribute("href") for link in page.query_selector_all(".md-search-result a"))
        assert elsewhere == []
        browser.close()
