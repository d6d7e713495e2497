"""`vtok tune`: candidates cost the same, resuming changes nothing, the winner is a config that runs; the command end to end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
import zoo
from filelock import FileLock
from PIL import Image
from typer.testing import CliRunner

import vtok
from vtok.capabilities import HasSearchSpace
from vtok.eval.cli.program import app
from vtok.eval.common.settings import pass_cost
from vtok.eval.common.statistics import paired_difference
from vtok.eval.options import Plan
from vtok.eval.tune import report as tune_report
from vtok.eval.tune.models import Prepared
from vtok.eval.tune.samples import in_memory, shuffled
from vtok.eval.tune.score import class_values, embedding_values, loss
from vtok.eval.tune.search import SEARCHES
from vtok.eval.tune.subjects import SLACK, Encoder
from vtok.eval.tune.tuner import Tuning, tune
from vtok.registry import METHODS, encoder_methods
from vtok.targets.resolve import towers

SIZE = (3, 64, 64)


def images(count, seed):
    """Smooth images: neighbouring patches are alike, others are not."""
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, SIZE[1:], mode="bilinear")


@pytest.fixture(scope="module")
def model():
    net = zoo.build("timm: ViT")
    assert net.patch_embed.img_size == SIZE[1:]
    return net


@pytest.fixture(scope="module")
def data(model):
    made = []
    for name, count, seed in (("calibration", 96, 1), ("held out", 60, 2)):
        pictures = images(count, seed)
        with torch.inference_mode():
            labels = model(pictures).argmax(1)
        made.append(in_memory(name, pictures, labels, seed))
    return made


def tuning(model, data, out, method="tome", flops=0.75, progress=None, params=None, **plan):
    config = METHODS.get(method)(**(params or {}))
    subject = Encoder(model, "tiny", config, data[0], SIZE)
    plan = {"candidates": 4, "batch_size": 32, **plan}
    return Tuning(subject, Plan(flops, **plan), data[0], data[1], out, progress)


def outcome(tuned):
    """All that a search found, as plain values."""
    found = [(one.config.to_dict(), one.fraction, one.point, one.samples, one.loss) for one in tuned.candidates]
    held = {name: {k: v.tolist() for k, v in one.values.items()} for name, one in tuned.held_out.items()}
    return found, tuned.best, held


def journal(out):
    """What a journal says, but for the searches that were opened."""
    lines = [json.loads(line) for line in (out / "search.journal").read_bytes().splitlines()]
    return [line for line in lines if line["op_code"] != 0]


SEARCHED = [name for name in encoder_methods() if isinstance(METHODS.get(name)(), HasSearchSpace)]


@pytest.mark.parametrize("method", SEARCHED)
def test_every_candidate_costs_what_the_default_costs(model, data, tmp_path, method):
    made = tuning(model, data, tmp_path, method)
    tuned = made.run()
    limit = tuned.candidates[0].fraction
    assert len(tuned.candidates) >= 2
    assert (
        tuned.candidates[0].config
        == vtok.plan(model, method, flops=0.75, calibration=next(data[0].read(0, 64, 64))[0]).configs[0]
    )
    for one in tuned.candidates[1:]:
        assert limit - SLACK <= one.fraction <= limit
        with vtok.patched(model, one.config), torch.inference_mode():
            model(next(data[0].read(0, 64, 64))[0])
            ran = pass_cost(model)
        assert (ran.macs + ran.reduction_macs) / ran.base_macs == pytest.approx(one.fraction, abs=1e-3)
    assert len({json.dumps(one.config.to_dict()) for one in tuned.candidates}) == len(tuned.candidates)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_winner_is_the_best_on_all_calibration_samples(model, data, tmp_path, search):
    made = tuning(model, data, tmp_path, search=search, candidates=9)
    tuned = made.run()
    pictures, labels = next(iter(data[0].read(0, 96, 96)))
    with torch.inference_mode():
        base = model(pictures)
        losses = []
        for one in tuned.candidates:
            with vtok.patched(model, one.config):
                values = class_values(model(pictures[: one.samples]), base[: one.samples], labels[: one.samples])
            losses.append(float(values["kl"].mean()))
    assert [one.loss[0] for one in tuned.candidates] == pytest.approx(losses, rel=1e-4)
    whole = [i for i, one in enumerate(tuned.candidates) if one.samples == 96]
    assert tuned.best == min(whole, key=losses.__getitem__) and 0 in whole
    if search == "random":
        assert len(whole) == 9
    else:
        assert {one.samples for one in tuned.candidates} == {32, 96} and len(whole) < 9


def test_a_seed_repeats_and_another_draws_others(model, data, tmp_path):
    first = outcome(tuning(model, data, tmp_path / "a").run())
    assert outcome(tuning(model, data, tmp_path / "b").run()) == first
    other = outcome(tuning(model, data, tmp_path / "c", seed=1).run())
    assert other[0][0] == first[0][0] and other[0][1] != first[0][1]


def test_a_search_may_be_made_longer(model, data, tmp_path):
    first = tuning(model, data, tmp_path / "a", candidates=3).run()
    longer = tuning(model, data, tmp_path / "a", candidates=5).run()
    assert longer.resumed == 3 and outcome(longer)[0][:3] == outcome(first)[0]
    assert outcome(longer) == outcome(tuning(model, data, tmp_path / "b", candidates=5).run())


def test_two_searches_in_one_folder_are_not_run_at_once(model, data, tmp_path):
    with FileLock(tmp_path / ".search.lock"), pytest.raises(vtok.ConfigError, match="another search is at work in"):
        tuning(model, data, tmp_path).run()


@pytest.mark.parametrize("text", [b"nonsense\n", b'{"a": 1}\n', b"[1]\n", b"\xff\n", b"3\n", b"half"])
def test_a_file_that_is_no_journal_is_refused(model, data, tmp_path, text):
    (tmp_path / "search.journal").write_bytes(text)
    with pytest.raises(vtok.ConfigError, match="is no journal of a search"):
        tuning(model, data, tmp_path).run()
    assert (tmp_path / "search.journal").read_bytes() == text


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("method", "places"), [("tome", (0, 0.3, 0.9)), pytest.param("ats", (0.5,), marks=pytest.mark.slow)])
def test_resuming_after_a_kill_changes_nothing(model, data, tmp_path, method, places):
    steps, plan = [], {"candidates": 3 if method == "ats" else 5}

    def start(out, progress=None):
        return tuning(model, data, out, method, progress=progress, **plan)

    whole = outcome(start(tmp_path / "whole", lambda *what: steps.append(what)).run())
    assert steps[-1][1] <= steps[-1][2] and [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    for after in (1 + int(place * len(steps)) for place in places):
        out, seen = tmp_path / f"killed-{after}", []

        def stop(*what, seen=seen, after=after):
            seen.append(what)
            if len(seen) == after:
                raise Killed

        with pytest.raises(Killed):
            start(out, stop).run()
        with open(out / "search.journal", "ab") as file:
            file.write(b'{"op_code": 4, "torn')
        assert outcome(start(out).run()) == whole
        assert sum(one.get("state") in (1, 2) for one in journal(out)) == sum(
            one.get("state") in (1, 2) for one in journal(tmp_path / "whole")
        ), "nothing that was finished was done twice"
        assert sum(one.get("state") == 3 for one in journal(out)) <= 1, "only what was being done is"
    before = journal(tmp_path / "whole")
    assert outcome(start(tmp_path / "whole").run()) == whole
    assert journal(tmp_path / "whole") == before


def test_the_run_file_and_the_records_say_what_was_found(model, data, tmp_path):
    made = tuning(model, data, tmp_path)
    tuned = made.run()
    about = Prepared(made.subject, data[0], data[1], {"backend": "timm", "name": "tiny"}, {"num_classes": 10})
    text = tune_report.run_file(tuned, about, made.plan, "two\nlines")
    assert text.startswith("# two\n# lines\n")
    content = yaml.safe_load(text)
    method = dict(content["method"])
    assert METHODS.get(method.pop("name"))(**method) == tuned.candidates[tuned.best].config
    records = tune_report.records_of(tuned, made.subject, made.plan, data[1])
    tune_report.keep_records(tmp_path / "results.jsonl", records)
    tune_report.keep_records(tmp_path / "results.jsonl", records)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["setting"].partition(":")[0] for line in lines] == ["unpatched", "default", "tuned"]
    unpatched, default, best = lines
    assert unpatched["metrics"]["top1"] == 100 and best["n"] == 60 and best["primary"] == "top1" and best["percent"]
    hits = [np.unpackbits(np.frombuffer(bytes.fromhex(line["correct"]), np.uint8))[:60] for line in lines]
    assert best["metrics"]["difference"] == pytest.approx(100 * (hits[2].mean() - 1))
    gap = hits[2].astype(float) - hits[1]
    assert best["metrics"]["top1_against_default"] == pytest.approx(100 * gap.mean())
    low, high = best["metrics"]["top1_against_default_ci"]
    assert (low, high) == pytest.approx(paired_difference(gap).scaled(100)[1:])
    assert default["metrics"]["agreement"] == default["metrics"]["top1"], "labels are what the unpatched model says"


def test_a_winner_that_is_the_default_is_said_to_be(model, data, tmp_path):
    tuned = tuning(model, data, tmp_path).run()
    tuned = replace(tuned, candidates=[replace(one, loss=(0.5,)) for one in tuned.candidates])
    assert tuned.best == 0, "the default wins a tie"
    assert "the default was best" in tune_report.finding(tuned)


@pytest.mark.parametrize("name", ["transformers: CLIP tower", "timm: EVA-02 rotary, SwiGLU"])
def test_any_encoder_can_be_tuned_from_python(tmp_path, name):
    net = zoo.build(name)
    ((_, tower),) = towers(net, None)
    pictures = torch.randn(12, *tower.input_size, generator=torch.Generator().manual_seed(0))
    tuned = tune(net, "pitome", 0.8, pictures[:8], held_out=(pictures[8:], None), out=tmp_path, candidates=3)
    vtok.patch(net, tuned.winner)
    measures = set(tuned.held_out["tuned"].values)
    assert measures == ({"distance"} if name.startswith("transformers") else {"kl", "agreement"})
    assert tuned.held_out["default"].cost["gmacs"]["model"] < 0.85 * tuned.held_out["default"].cost["gmacs"]["base"]


def test_measures_against_formulas():
    torch.manual_seed(0)
    ours, theirs, labels = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    values = class_values(ours, theirs, labels)
    p, q = theirs.double().softmax(1), ours.double().softmax(1)
    assert values["kl"] == pytest.approx((p * (p / q).log()).sum(1).numpy())
    assert values["cross_entropy"] == pytest.approx(-q[range(5), labels].log().numpy())
    assert values["top1"].tolist() == (ours.argmax(1) == labels).double().tolist()
    assert set(class_values(ours, theirs, None)) == {"kl", "agreement"}
    cosine = torch.nn.functional.cosine_similarity(ours, theirs)
    assert embedding_values(ours, theirs)["distance"] == pytest.approx(1 - cosine.numpy(), abs=1e-6)
    assert loss("accuracy", values) == (1 - values["top1"].mean(), values["kl"].mean())


def test_what_cannot_be_searched_is_refused(model, data, tmp_path):
    unlabelled = in_memory("images", images(40, 3), None, 3)
    with pytest.raises(vtok.ConfigError, match=r"objective accuracy needs top1, .* possible: kl, agreement$"):
        tuning(model, [unlabelled, unlabelled], tmp_path / "a", objective="accuracy").run()
    with pytest.raises(vtok.UnknownNameError, match="unknown objective 'speed'"):
        tuning(model, data, tmp_path / "b", objective="speed").run()
    with pytest.raises(vtok.ConfigError, match=r"nothing is left to search for ats: layers=\[2, 3\] fixes its schedule"):
        tuning(model, data, tmp_path / "c", "ats", params={"layers": [2, 3]}).run()
    with pytest.raises(vtok.UnsupportedModelError, match="todre acts on prompts"):
        tuning(model, data, tmp_path / "d", "todre")
    with pytest.raises(vtok.BudgetError, match="cannot bring"):
        tuning(model, data, tmp_path / "e", flops=0.01).run()


def test_shuffled_orders_differ_by_seed_and_split():
    assert sorted(shuffled(50, 0)) == list(range(50))
    assert len({tuple(shuffled(50, seed, what)) for seed in range(3) for what in ("a", "b")}) == 6


CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 images of 3 classes and one file that is none."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir()
        for i in range(10):
            coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((90, 75), Image.Resampling.BICUBIC).save(root / name / f"{i}.png")
    (root / "cat" / "broken.png").write_text("not an image")
    return root


def vtok_tune(*arguments):
    result = CliRunner().invoke(app, ["tune", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


FAST = ("--no-pretrained", "--workers", 0, "--batch-size", 8, "--candidates", 3)


def test_a_timm_model_on_a_folder_end_to_end(folder, tmp_path):
    out = tmp_path / "out"
    args = ("test_vit", "pitome", "--flops", 0.8, "--data", folder, "--images", 12, "--num-classes", 3, "--out", out, *FAST)
    printed = vtok_tune(*args)
    assert re.search(r"tuned - default|the default was best", printed) and "agreement" in printed
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert records[0]["n"] in (18, 19) and "top1" in records[0]["metrics"]
    content = yaml.safe_load((out / "tuned.yaml").read_text())
    assert content["model"] == {"backend": "timm", "name": "test_vit"} and content["options"] == {"num_classes": 3}
    assert content["data"] == str(folder)
    model = vtok.eval.models.by_name.load_model("test_vit")
    vtok.patch(model, out / "tuned.json")
    from vtok.eval.runs import loader as runs

    run = runs.load(str(out / "tuned.yaml"))
    assert run.output == str(out / "run")
    assert run.method == vtok.targets.encoder.run_of(model).patch.configs[0]
    before = journal(out)
    with open(out / "search.journal", "ab") as file:
        file.write(b'{"op_code": 4, "torn')
    assert "held 3 candidates; none was repeated" in vtok_tune(*args)
    assert journal(out) == before


def test_unlabelled_images_need_no_labels(folder, tmp_path):
    printed = vtok_tune(
        "test_vit", "tome", "--flops", 0.8, "--data", folder, "--images", 8, "--held-out-images", 6, "--out", tmp_path, *FAST
    )
    assert "no accuracy is reported" in printed and "agreement" in printed
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert records[-1]["primary"] == "agreement" and "top1" not in records[-1]["metrics"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("reference", "tome:flops=0.5", "--flops", 0.6), "give the budget as --flops"),
        (("reference", "tome", "--flops", 0.6, "--data", "x"), "reference comes with its images"),
        (("reference", "tome", "--flops", 0.6, "--images", 1001), "--images 1001 is more than there is: 1000 calibration"),
        (("test_vit", "tome", "--flops", 0.6, *FAST), "brings no images: pass --data FOLDER"),
        (("test_vit", "tome", "--flops", 0.6, "--data", "{}", "--held-out", "{}/.", *FAST), "is the calibration folder"),
        (("test_vit", "tome", "--flops", 0.6, "--data", "{}", "--images", 31, *FAST), "none is left to compare on"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(folder, arguments, message):
    with pytest.raises(vtok.ConfigError, match=re.escape(message)):
        vtok_tune(*(str(one).replace("{}", str(folder)) for one in arguments))


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_as_if_nothing_had_happened(folder, tmp_path):
    """SIGKILL at random moments, until it gets through."""
    arguments = ["test_vit", "tome", "--flops", "0.8", "--data", str(folder), "--images", "20", "--held-out-images", "8"]
    arguments += ["--no-pretrained", "--workers", "0", "--batch-size", "4", "--candidates", "8", "--search", "random"]
    command = [sys.executable, "-m", "vtok.eval", "tune", *arguments]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.monotonic()
    subprocess.run([*command, "--out", str(whole)], check=True, capture_output=True)
    seconds = time.monotonic() - start
    rng = np.random.default_rng(1)
    for _ in range(6):
        process = subprocess.Popen(
            [*command, "--out", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(rng.uniform(0.3, 1) * seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*command, "--out", str(killed)], check=True, capture_output=True)

    def lines(folder, name):
        return [json.loads(line) for line in (folder / name).read_text().splitlines()]

    assert lines(killed, "results.jsonl") == lines(whole, "results.jsonl")
    assert (killed / "tuned.json").read_bytes() == (whole / "tuned.json").read_bytes()
