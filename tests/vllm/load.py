"""Load: PYTHON load.py FOLDER [SETTINGS] [REQUESTS] asks `vllm serve` with and without the key, turn by turn, on loopback.

Both servers run at once, so that other work on the machine meets both alike; only one is asked at a time. FOLDER gets a random
LLaVA whose prefill counts (576 visual tokens, an LLM 512 wide and 8 deep), if it is not there. For 1, 8 and 32 requests at
once, but at most REQUESTS, it prints the median time to the first token, and requests and generated tokens a second. Every
picture is new to both.
"""

import base64
import io
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from asked import picture
from tiny import llava

PORTS = {"unpruned": 8301, "pruned": 8302}
TOKENS = 16


def serve(folder, name, settings):
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(folder), "--host", "127.0.0.1", "--port", str(PORTS[name]),
        "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--served-model-name", "m",
        "--max-num-batched-tokens", "8192", "--no-enable-prefix-caching", "--mm-processor-cache-gb", "0",
        "--limit-mm-per-prompt", '{"image": 1}', "--chat-template-content-format", "openai",
    ]  # fmt: skip
    if settings is not None:
        command += ["--hf-overrides", json.dumps({"vtok": settings})]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def ready(name, server):
    for _ in range(900):
        assert server.poll() is None, f"the {name} server has stopped"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORTS[name]}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError(name)


def ask(name, seed):
    """(seconds to the first token, prompt tokens)."""
    buffer = io.BytesIO()
    picture(seed, (336, 336)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": " ".join(f"w{i}" for i in range(24))}]
    body = {
        "model": "m", "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, "messages": [{"role": "user", "content": content}],
    }  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORTS[name]}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    started, first, length = time.perf_counter(), None, 0
    with urllib.request.urlopen(request, timeout=900) as lines:
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            part = json.loads(line[6:])
            if first is None and part["choices"] and part["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - started
            length = (part.get("usage") or {}).get("prompt_tokens", length)
    assert first is not None
    return first, length


def main():
    folder = Path(sys.argv[1])
    settings = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {"method": "todre", "keep_tokens": 64}
    most = int(sys.argv[3]) if len(sys.argv) > 3 else 32
    if not (folder / "config.json").exists():
        wide = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
        llava(folder, size=336, patch=14, wide=wide)
    servers = {name: serve(folder, name, settings if name == "pruned" else None) for name in PORTS}
    try:
        for name, server in servers.items():
            ready(name, server)
            ask(name, 1)
        seed = 10
        for at_once in dict.fromkeys(min(many, most) for many in (1, 8, 32)):
            count = max(4, at_once)
            spent, first, lengths = dict.fromkeys(PORTS, 0.0), {name: [] for name in PORTS}, {}
            for turn in range(2):
                for name in list(PORTS)[:: 1 if turn else -1]:
                    with ThreadPoolExecutor(at_once) as pool:
                        started = time.perf_counter()
                        found = list(pool.map(lambda i, name=name: ask(name, i), range(seed, seed + count)))
                        spent[name] += time.perf_counter() - started
                    first[name] += [one for one, _ in found]
                    lengths[name] = found[0][1]
                    seed += count
            for name in PORTS:
                rate = 2 * count / spent[name]
                print(
                    f"{at_once} at once, {name}: prompts of {lengths[name]} tokens, first token "
                    f"{statistics.median(first[name]):.2f} s, {rate:.2f} requests/s, {rate * TOKENS:.1f} tokens/s",
                    flush=True,
                )
    finally:
        for server in servers.values():
            server.terminate()
        for server in servers.values():
            server.wait(60)


if __name__ == "__main__":
    main()
