"""A server with the demo model, and OpenAI's client for it."""

import json
import os
import pathlib
import shutil
import subprocess

import openai
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[4]
COMMAND = os.environ.get("CANDLE_COREML", str(ROOT / "target" / "debug" / "candle-coreml"))
TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}"
    '<tool_call>{"name": …}</tool_call><|im_end|>\n{% endif %}'
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tools_bundle(tmp_path_factory):
    """The demo model with a template that knows tools."""
    folder = tmp_path_factory.mktemp("models") / "tools"
    shutil.copytree(ROOT / "models" / "tales", folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = TOOLS_TEMPLATE
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def address(tools_bundle):
    encoder = ROOT / "crates" / "llm" / "testdata" / "encoders" / "ranged"
    process = subprocess.Popen(
        [COMMAND, "serve", str(ROOT / "models" / "tales"), str(tools_bundle), "--embedding", f"small={encoder}",
         "--port", "0", "--api-key", "secret", "--quiet"],
        stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line.startswith("http://"), line
    yield line.split()[0]
    process.terminate()
    assert process.wait(timeout=60) == 0


@pytest.fixture(scope="session")
def client(address):
    return openai.OpenAI(base_url=address + "/v1", api_key="secret", max_retries=0, timeout=300)
