"""`vllm serve` on this machine's loopback, asked by an OpenAI client."""

import base64
import io
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from asked import SIZES, picture
from cases import CASES

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
PORT = 8199


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    openai = pytest.importorskip("openai")
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(model("llava")), "--host", "127.0.0.1", "--port", str(PORT),
        "--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--served-model-name", "tiny", "--block-size", "32",
        "--chat-template-content-format", "openai", "--hf-overrides", json.dumps({"vtok": CASES["llava"]["todre"]}),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    made = openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=0, timeout=300)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                made.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(1)
        made.log = log
        yield made
    finally:
        server.terminate()
        server.wait(60)


def question(client, seed):
    """Answer and usage for one picture."""
    buffer = io.BytesIO()
    picture(seed, SIZES[seed % len(SIZES)]).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"w{seed} w2 w3"}]
    found = client.chat.completions.create(
        model="tiny",
        temperature=0,
        max_tokens=4,
        messages=[{"role": "user", "content": content}],
        extra_body={"ignore_eos": True},
    )
    return found.choices[0].message.content, found.usage


def test_the_server_says_what_it_does_and_counts_what_stays(client):
    answer, usage = question(client, 3)
    assert usage.prompt_tokens == 12 + 3  # of 64 visual tokens, and three words
    assert len(answer.split()) == 4
    log = client.log.read_text()
    assert "vtok: method='todre'" in log


@pytest.mark.parametrize("at_once", [1, 8, 32])
def test_two_hundred_requests_lose_nothing(client, at_once):
    alone = {seed: question(client, seed)[0] for seed in range(20)}
    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(lambda i: question(client, i % 20), range(200)))
    assert len(found) == 200
    assert {usage.prompt_tokens for _, usage in found} == {15}
    assert [answer for answer, _ in found] == [alone[i % 20] for i in range(200)]
