"""Videos: which frames are read, how models are shown them, and the sets of questions about them."""

import json
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("av")

from helpers_videos import brightness, save_video, tiny_onevision, tiny_qwen

import vtok
from vtok.eval.common.videos import check_video, read_clip
from vtok.eval.models.vlm import REFERENCE_LLAVA, load_vlm
from vtok.eval.tasks import QUESTION_TASKS, TASKS
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.records import Scored
from vtok.eval.tasks.vqa.task import Sources, VQAOptions
from vtok.eval.tasks.vqa_video.videos import Span


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("count", "bounds", "numbers"),
    [
        (4, (), [0, 9, 19, 29]),
        (1, (), [0]),
        (100, (), list(range(30))),
        (3, (1.0, 2.0), [10, 15, 20]),
        (3, (2.5, 60.0), [25, 27, 29]),
    ],
)
def test_frames_at_equal_distances(count, bounds, numbers, tmp_path):
    clip = read_clip(str(save_video(tmp_path / "a.mp4")), count, *bounds)
    assert (list(clip.numbers), clip.fps, clip.total) == (numbers, 10, 30)
    # the frames are those of these numbers: their brightness rises by 8 a frame
    for number, frame in zip(clip.numbers, clip.frames):
        assert frame.size == (16, 16) and frame.mode == "RGB" and brightness(frame) == pytest.approx(8 * number + 4, abs=4)


def test_a_file_that_breaks_off_has_the_frames_that_it_has(tmp_path):
    path = save_video(tmp_path / "a.mkv")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    clip = read_clip(str(path), 4)
    assert 4 <= clip.total < 30 and list(clip.numbers)[-1] == clip.total - 1 and len(clip.frames) == 4
    assert brightness(clip.frames[-1]) > brightness(clip.frames[0])


def test_a_folder_with_a_picture_a_frame(tmp_path):
    clip = read_clip(str(save_video(tmp_path / "a.mp4")), 30)
    (tmp_path / "frames").mkdir()
    for i, frame in enumerate(clip.frames):
        frame.save(tmp_path / "frames" / f"{i:05d}.jpg")
    found = read_clip(str(tmp_path / "frames"), 3, 1.0, 3.0)  # three a second
    assert (list(found.numbers), found.fps, found.total) == ([3, 6, 9], 3.0, 30)
    assert [brightness(f) for f in found.frames] == pytest.approx([brightness(clip.frames[i]) for i in (3, 6, 9)], abs=2)
    check_video(str(tmp_path / "frames"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(vtok.ConfigError, match=r"empty holds no frames \(\.jpg, \.png\)"):
        check_video(str(tmp_path / "empty"))


def test_what_is_no_video(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(vtok.ConfigError, match=r"a\.mp4 cannot be read as a video") as caught:
        read_clip(str(tmp_path / "a.mp4"), 4)
    assert "\n" not in str(caught.value)
    with pytest.raises(vtok.ConfigError, match=r"b\.mp4 does not exist; name a video file"):
        check_video(str(tmp_path / "b.mp4"))
    path = str(save_video(tmp_path / "c.mp4"))
    with pytest.raises(vtok.ConfigError, match=r"c\.mp4 has 30 frames, none between 9\.0 and 10\.0 seconds"):
        read_clip(path, 4, 9.0, 10.0)


def test_the_library_is_optional(tmp_path, monkeypatch):
    path = str(save_video(tmp_path / "a.mp4"))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(vtok.VtokError, match=r'av is not installed; run: pip install "vtok\[video\]"'):
        read_clip(path, 4)


MOVING = {"video": "v0.mp4", "question": "w5 w6?", "candidates": ["up", "down"], "answer": "down"}


def mvbench(folder):
    """Two kinds, one of them with parts of a video."""
    put(folder / "json" / "moving_count.json", [MOVING, {**MOVING, "video": "v1.mp4", "answer": "up"}])
    put(folder / "json" / "action_sequence.json", [{**MOVING, "start": 1.0, "end": 2.0}, {**MOVING, "start": 0, "end": 1.5}])
    for seed in (0, 1):
        save_video(folder / "video" / "clevrer" / "video_validation" / f"v{seed}.mp4", seed=seed)
    save_video(folder / "video" / "star" / "Charades_v1_480" / "v0.mp4", seed=2)
    return folder


def test_the_questions_of_mvbench(tmp_path):
    data = QUESTION_TASKS.get("mvbench").open(Sources(str(mvbench(tmp_path)), frames=4))
    assert (data.name, data.prompt, QUESTION_TASKS.get("mvbench").max_new_tokens) == (
        "mvbench, 4 frames",
        "Only give the best option.\n",
        16,
    )
    parts, whole = data.questions[:2], data.questions[2:]
    assert [q.groups["kind"] for q in data.questions] == ["action_sequence"] * 2 + ["moving_count"] * 2
    assert whole[0].text == "Question:w5 w6?\nOption:\n(A) up\n(B) down\n"
    assert [q.target for q in whole] == ["B", "A"] and [q.doc_id for q in whole] == ["moving_count/0", "moving_count/1"]
    star = str(tmp_path / "video" / "star" / "Charades_v1_480" / "v0.mp4")
    assert [q.image for q in parts] == [Span(star, 1.0, 2.0), Span(star, 0.0, 1.5)]
    assert list(data.read(parts[0].image).numbers) == [10, 13, 16, 20] and list(data.read(whole[0].image).numbers) == [
        0,
        9,
        19,
        29,
    ]
    # parts that are cut out already
    (tmp_path / "video" / "star" / "Charades_v1_480").rename(tmp_path / "video" / "star" / "Charades_segment")
    again = QUESTION_TASKS.get("mvbench").open(Sources(str(tmp_path), split="action_sequence"))
    assert [q.image for q in again.questions] == [star.replace("v1_480", "segment")] * 2 and again.split == "action_sequence"


def test_identity_knows_frames_and_parts(tmp_path):
    folder = str(mvbench(tmp_path))
    open_with = lambda frames: QUESTION_TASKS.get("mvbench").open(Sources(folder, frames=frames))  # noqa: E731
    first = open_with(4)
    assert first.identity() == open_with(4).identity() != open_with(5).identity()
    keys = [first.identify(q.image) for q in first.questions]
    assert len(set(keys)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "left"}, "entry 0: 'answer' must be one of its candidates ['up', 'down'], found 'left'"),
        ({"candidates": []}, "entry 0: 'candidates' must be a list of at least one text, found []"),
        ({"video": "v7.mp4"}, "entry 0: the video v7.mp4 is missing from"),
        ({"video": None}, "entry 0 has no 'video'"),
        ({"start": 2.0, "end": 1.0}, "'start' and 'end' must be rising seconds, found 2.0 and 1.0"),
    ],
)
def test_files_of_mvbench_that_cannot_be_asked(change, message, tmp_path):
    folder = mvbench(tmp_path)
    put(folder / "json" / "moving_count.json", [{**MOVING, **change}])
    with pytest.raises(vtok.ConfigError) as caught:
        QUESTION_TASKS.get("mvbench").open(Sources(str(folder)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_mvbench(tmp_path):
    with pytest.raises(vtok.ConfigError, match=r"holds no file KIND\.json, where KIND is one of action_antonym, "):
        QUESTION_TASKS.get("mvbench").open(Sources(str(tmp_path)))


def test_the_average_of_mvbench():
    """Kinds count alike, whatever their size; an empty answer counts nowhere."""
    kinds = ["moving_count"] * 3 + ["action_count"]
    questions = [Question(i, "q", ("A",), i, {"kind": kind}) for i, kind in enumerate(kinds)]
    found = Scored(VQAData("x", questions, None), ["A", "(B)", "", "A. up"], QUESTION_TASKS.get("mvbench")).metrics(None)
    assert found["accuracy"] == pytest.approx(2 / 3) and found["accuracy_all"] == pytest.approx(2 / 4)
    assert found["average"] == pytest.approx((1 / 2 + 1) / 2)


@pytest.mark.parametrize(
    ("make", "method", "visual"),
    [
        (tiny_onevision, ("uniform", {"keep": 0.5}), None),
        (tiny_qwen, ("vidcom2", {"keep": 0.5}), 2 * 4),  # two steps of 2 x 2 tokens: 16 pixels, patches of 4, merged by 2
    ],
)
def test_models_for_videos_are_asked(make, method, visual, tmp_path):
    options = VQAOptions(frames=4, max_new_tokens=2, batch_size=2, device="cpu", output=str(tmp_path / "out"))
    base, patched = TASKS.get("mvbench")(make(), str(mvbench(tmp_path / "data")), [None, method], options)
    assert base["n"] == 4 and base["dataset"] == "mvbench, 4 frames" and base["split"] == "train"
    assert visual is None or base["tokens"]["in"] == visual
    assert patched["tokens"]["mean_per_layer"][-1] == pytest.approx(0.5 * base["tokens"]["in"], abs=1)
    assert set(base["groups"]["kind"]) == {"moving_count", "action_sequence"}
    assert {"accuracy", "average"} <= set(base["metrics"]) and patched["metrics"]["accuracy_difference"] is not None


def test_a_model_for_images_is_shown_frames_as_images_on_request(tmp_path):
    folder, llava = str(mvbench(tmp_path / "data")), load_vlm(REFERENCE_LLAVA)
    options = {"frames": 2, "max_new_tokens": 2, "batch_size": 4, "device": "cpu", "split": "moving_count"}
    with pytest.raises(vtok.ConfigError, match=r"LlavaProcessor, .*, reads no videos; with --frames-as-images"):
        TASKS.get("mvbench")(llava, folder, [None], VQAOptions(**options))
    (record,) = TASKS.get("mvbench")(llava, folder, [None], VQAOptions(**options, frames_as_images=True))
    assert record["tokens"]["in"] == 2 * 256 and record["n"] == 2


def test_a_video_that_cannot_be_read_is_left_out(tmp_path):
    folder = mvbench(tmp_path / "data")
    (folder / "video" / "clevrer" / "video_validation" / "v1.mp4").write_bytes(b"damaged")
    options = VQAOptions(frames=2, max_new_tokens=1, batch_size=4, device="cpu", split="moving_count")
    (record,) = TASKS.get("mvbench")(tiny_onevision(), str(folder), [None], options)
    assert record["n"] == 1 and record["num_skipped"] == 1 and record["skipped"][0]["file"].endswith("v1.mp4")


def videomme(folder):
    datasets = pytest.importorskip("datasets")
    rows = [
        {
            "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Law", "videoID": f"id{n % 2}",
            "question_id": f"001-{n}", "task_type": "Counting Problem", "question": "How many?", "answer": "AB"[n % 2],
            "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
        }
        for n in range(3)
    ]  # fmt: skip
    (folder / "videomme").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "videomme" / "test-00000-of-00001.parquet"))
    for seed in (0, 1):
        save_video(folder / "data" / f"id{seed}.mp4", seed=seed)
    return folder


def test_the_questions_of_video_mme(tmp_path):
    folder = videomme(tmp_path)
    task = QUESTION_TASKS.get("videomme")
    data = task.open(Sources(str(folder), frames=3))
    assert data.name == "videomme, 3 frames" and [q.target for q in data.questions] == ["A", "B", "A"]
    assert data.questions[0].text + data.prompt == (
        "Select the best answer to the following multiple-choice question based on the video and the subtitles. Respond with "
        "only the letter (A, B, C, or D) of the correct option.\nHow many?\nA. One.\nB. Two.\nC. Three.\nD. Four.\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert data.questions[2].image == str(folder / "data" / "id0.mp4") and len(data.read(data.questions[0].image).frames) == 3
    (folder / "data").rename(tmp_path / "elsewhere")
    moved = task.open(Sources(str(folder / "videomme"), images=str(tmp_path / "elsewhere")))
    assert moved.questions[1].image == str(tmp_path / "elsewhere" / "id1.mp4")
    with pytest.raises(vtok.ConfigError, match=r"row 0: the video id0 is missing from"):
        task.open(Sources(str(folder / "videomme")))


def test_video_mme_elsewhere(tmp_path):
    task = QUESTION_TASKS.get("videomme")
    with pytest.raises(vtok.ConfigError, match=r"the videos of videomme are no part of its rows: pass the folder that holds"):
        task.open(Sources("hub"))
    with pytest.raises(vtok.ConfigError, match=r"Video-MME's questions are rows of the datasets library: pass hub, or"):
        task.open(Sources(str(tmp_path)))
